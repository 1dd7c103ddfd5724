// The loop all encoders share: the entries of x @ W_enc + b_enc above a limit, never held for more than one tile.
//
// Tasks are (row block, latent range) pairs. Within a task, blocks of latents are visited by every panel of rows:
//
//   direct    canonical float32 dots of all entries; a block fits half an L2, converted and transposed first where W_enc's
//             dtype or layout asks for it
//   screened  int8 products with a rigorous margin (screen.h) find candidates, canonical float32 dots of those decide;
//             a block in which too many are candidates is computed directly
//
// Both give the same bits, since the same dot decides. Screening pays where the processor multiplies int8 several times
// faster than float32 and either the latents' codes exist (a packed encoder) or enough rows share the work of making them.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/packed_encoder.h"
#include "cpu/padded_rows.h"
#include "cpu/screen.h"

namespace gemmascope_fast {

// Checks x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae] and that 32-bit indices suffice.
void check_encode(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc);

class EncodeTiles {
 public:
  struct Task {
    int64_t row_begin, row_end, latent_begin, latent_end;
    int64_t rows() const { return row_end - row_begin; }
    int64_t latents() const { return latent_end - latent_begin; }
  };
  // Called with entries of one row whose pre = dot + bias is above the limit or NaN: latents latent + position[i], i < count.
  // Within a task the latents of a row ascend, unless they are shuffled.
  using Visit = std::function<void(int64_t row, int64_t latent, int64_t count,
                                   const int32_t* position, const float* pre)>;

  // Neither side of a task exceeds this, so that 16 bits hold a position inside it.
  static constexpr int64_t kMaxSide = 65536;

  // packed: codes of w, or none. The report of the calling thread's encode is written when this goes out of scope.
  EncodeTiles(const char* op, const Matrix& x, const Matrix& w,
              const std::optional<PackedEncoder>& packed);
  ~EncodeTiles();

  int64_t rows() const { return n_; }
  int64_t latents() const { return d_sae_; }
  int64_t row_block() const { return row_block_; }
  int64_t ranges() const { return ranges_; }
  int64_t tasks() const { return row_blocks_ * ranges_; }
  // Thread slots to run the tasks with.
  int64_t slots() const { return slots_; }
  Task task(int64_t index) const;
  void run(const Task& task, int64_t slot, const EncodeLimits& limits, const Visit& visit);
  // Whether limits may have `expect`, k entries a row being wanted: what waits costs less than it saves.
  bool holds(int64_t k) const;
  // Decides what the tasks that ran in the slot held back.
  void finish(int64_t slot, const EncodeLimits& limits, const Visit& visit);

  bool screened() const { return why_direct_ == nullptr; }
  // From now on `run` visits blocks of latents in a random order, and a task is a part of that. Limits that are learnt on the
  // way want an order that is none of the values'. Dictionaries come sorted, and with a first group that fires more than the
  // others: that comes last, and never passes for the whole. The latents of a row do not ascend then.
  void shuffle();
  // Of the row's latents, those that `run` has visited or is about to, since the order was shuffled.
  int64_t visited(int64_t row) const {
    return visited_[static_cast<size_t>(row / row_block_)].load(std::memory_order_relaxed);
  }

 private:
  struct Block {
    int64_t begin, count;
  };
  // Blocks that the tokens' codes pass by together.
  static constexpr int64_t kMostBlocks = 4;
  struct Group {
    Block blocks[kMostBlocks] = {};
    int64_t count = 0;
    // Where latent l of the group is: the group's blocks follow each other.
    int64_t latent(int64_t l) const { return blocks[l / kScreenBlock].begin + l % kScreenBlock; }
  };
  struct Candidate {
    int32_t row, latent;  // the latter relative to the group
    float product, most;  // most: set where candidates are held, as below
  };
  struct Wanted {
    int32_t row, latent;
    float most;  // a limit that it cannot pass
  };
  // Candidates that no code rules out, by latent; `last` is the block of the last ones where groups have one block.
  struct Pending {
    Block last{0, 0};
    std::vector<Wanted> entries;
  };
  // Those that wait for the limits to rise, a group of blocks each, the oldest first.
  struct Held {
    std::deque<std::vector<Wanted>> groups;
    int64_t entries = 0;
  };
  struct Scratch {
    FloatBuffer weights, state, dots, products, fine_dots;
    std::vector<int32_t> position;
    std::vector<float> pre;
    LatentScratch latents;
    std::vector<Candidate> candidates;
    Pending pending;
    Held held;
    std::vector<FinePair> fine_pairs;
    std::vector<const float*> pair_x;
    std::vector<const void*> pair_w;
    std::vector<const char*> pieces, ahead;
    std::vector<uint8_t> code_rows;
    ScreenLatents bounds[kMostBlocks];
    LatentBlock codes[kMostBlocks];
    int64_t screened_blocks = 0, direct_blocks = 0, candidate_count = 0, rescored = 0;
  };

  void partition();
  void convert_x();
  void run_direct(const Task& task, int64_t begin, int64_t end, Scratch& scratch,
                  const EncodeLimits& limits, const Visit& visit);
  void run_unscreened(const Task& task, int64_t place, int64_t end, Scratch& scratch,
                      const EncodeLimits& limits, const Visit& visit);
  void run_screened(const Task& task, Scratch& scratch, const EncodeLimits& limits,
                    const Visit& visit);
  LatentBlock latent_block(int64_t begin, int64_t count, Scratch& scratch);
  // The block at a place of a task; none behind the last one.
  Block block_at(const Task& task, int64_t place) const;
  // The latents of places [place, end) are about to be visited.
  void count_visited(const Task& task, int64_t place, int64_t end);
  // Whether the candidates of many blocks are rescored together, and blocks multiplied in groups.
  bool gathers() const { return hot_floats_ > 0 && row_block_ * x_stride_ > 2 * hot_floats_; }
  // The blocks from a place of a task that are multiplied together; one of them where they go alone.
  Group group_at(const Task& task, int64_t place, bool alone) const;
  void read_ahead(const Task& task, const Group& next, int64_t blocks, Scratch& scratch) const;
  void multiply(int64_t row, int64_t rows, int64_t blocks, const EncodeLimits& limits,
                const char* const* ahead, Scratch& scratch, uint64_t* masks) const;
  bool find_candidates(const Task& task, const Group& own, const Group& next, Scratch& scratch,
                       const EncodeLimits& limits);
  void refine(int64_t blocks, Scratch& scratch, const EncodeLimits& limits);
  static void sort_candidates(const Group& group, Scratch& scratch, std::vector<Wanted>& target);
  void keep_candidates(const Group& group, Scratch& scratch, const EncodeLimits& limits);
  void hold(const Group& group, Scratch& scratch, const EncodeLimits& limits);
  void release(Scratch& scratch, const EncodeLimits& limits);
  void pair_rows(Scratch& scratch);
  void rescore(Scratch& scratch, const EncodeLimits& limits, const Visit& visit);

  const char* op_;
  const DotTable& table_;
  PaddedRows x_rows_, w_rows_;
  int64_t n_, d_sae_, row_block_ = 0, row_blocks_ = 0, block_ = 0, range_ = 0, ranges_ = 0;
  int64_t slots_ = 1;
  FloatBuffer x_buffer_;
  const float* x_ = nullptr;
  int64_t x_stride_ = 0;
  const char* why_direct_;  // null: screened
  // Of x: as many stay in L2 while rows of W_enc pass by. Set where these can be read in any order and the product is too fast
  // for them to be read meanwhile.
  int64_t hot_floats_ = 0;
  std::optional<PackedEncoder> packed_;
  std::vector<float> center_;
  std::unique_ptr<ScreenedTokens> tokens_;
  std::vector<Scratch> scratch_;
  std::vector<int64_t> order_;  // of blocks; empty: ascending
  std::vector<std::atomic<int64_t>> visited_;
};

}  // namespace gemmascope_fast
