#include "cpu/adam_rows.h"

#include <algorithm>
#include <cmath>

namespace gemmascope_fast {
namespace {

template <typename T>
T* rows_of(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t rows,
           int64_t cols) {
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, {rows, cols});
  if (cols > 1 && t.stride(1) != 1) fail(op, name, " must have contiguous rows");
  return static_cast<T*>(t.data_ptr());
}

int64_t row_stride(const Tensor& t) { return t.stride(0); }

void check_rates(const char* op, const std::vector<double>& rates) {
  if (rates.size() != 4) {
    fail(op, "rates must be [lr, beta1, beta2, eps], got ", rates.size(), " elements");
  }
  if (!(rates[0] >= 0) || !std::isfinite(rates[0])) fail(op, "lr must be >= 0, got ", rates[0]);
  for (int i = 1; i <= 2; ++i) {
    if (!(rates[i] >= 0 && rates[i] < 1)) {
      fail(op, "beta", i, " must be in [0, 1), got ", rates[i]);
    }
  }
  if (!(rates[3] >= 0)) fail(op, "eps must be >= 0, got ", rates[3]);
}

void check_rule(const char* op, const std::vector<int64_t>& rule) {
  if (rule.size() != 5) {
    fail(op, "rule must be [step, tail, remove_parallel, unit_norm, seed], got ", rule.size(),
         " elements");
  }
  if (rule[0] < 1) fail(op, "step must be >= 1, got ", rule[0]);
  if (rule[1] < 0) fail(op, "tail must be >= 0, got ", rule[1]);
}

void read_state(const char* op, const std::vector<Tensor>& state, AdamMatrix* m) {
  const int64_t rows = m->weight.rows, cols = m->weight.cols;
  if (state.size() != 4) {
    fail(op, "state must be [exp_avg, exp_avg_sq, exponents, touched_at], got ", state.size(),
         " tensors");
  }
  if (m->beta1 > 0) {
    m->exp_avg = rows_of<float>(op, "exp_avg", state[0], ScalarType::Float, rows, cols);
    m->exp_avg_stride = row_stride(state[0]);
  }
  if (state[1].scalar_type() == ScalarType::Byte) {
    m->codes = rows_of<uint8_t>(op, "exp_avg_sq", state[1], ScalarType::Byte, rows, cols);
    m->blocks = (cols + kMomentBlock - 1) / kMomentBlock;
    m->exponents = rows_of<uint8_t>(op, "exponents", state[2], ScalarType::Byte, rows, m->blocks);
    if (m->blocks > 0 && rows > 1 && row_stride(state[2]) != m->blocks) {
      fail(op, "exponents must be contiguous");
    }
  } else {
    m->exp_avg_sq = rows_of<float>(op, "exp_avg_sq", state[1], ScalarType::Float, rows, cols);
  }
  m->exp_avg_sq_stride = row_stride(state[1]);
  check_dtype(op, "touched_at", state[3], ScalarType::Long);
  check_shape(op, "touched_at", state[3], {rows});
  if (rows > 1 && state[3].stride(0) != 1) fail(op, "touched_at must be contiguous");
  m->touched_at = static_cast<int64_t*>(state[3].data_ptr());
}

float power(double beta, int64_t k) {
  return static_cast<float>(k == 1 ? beta : std::pow(beta, static_cast<double>(k)));
}

}  // namespace

AdamMatrix adam_matrix(const char* op, const char* name, const Matrix& weight,
                       const std::vector<Tensor>& state, const std::vector<double>& rates,
                       const std::vector<int64_t>& rule) {
  if (weight.dtype == Dtype::kFloat16) fail(op, name, " must be float32 or bfloat16, got Half");
  if (!unit_columns(weight)) {
    fail(op, name, " must have one contiguous row of memory per latent");
  }
  check_rates(op, rates);
  check_rule(op, rule);
  AdamMatrix m;
  m.weight = weight;
  m.beta1 = rates[1];
  m.beta2 = rates[2];
  m.step = rule[0];
  m.tail = std::min(rule[1], rule[0]);
  m.remove_parallel = rule[2] != 0;
  m.unit_norm = rule[3] != 0;
  m.seed = static_cast<uint64_t>(rule[4]);
  read_state(op, state, &m);
  const double t = static_cast<double>(m.step);
  m.scalars.step_size = static_cast<float>(rates[0] / (1 - std::pow(m.beta1, t)));
  m.scalars.one_minus1 = static_cast<float>(1 - m.beta1);
  m.scalars.one_minus2 = static_cast<float>(1 - m.beta2);
  m.scalars.scale = static_cast<float>(1 / std::sqrt(1 - std::pow(m.beta2, t)));
  m.scalars.eps = static_cast<float>(rates[3]);
  return m;
}

AdamRows::AdamRows(const AdamMatrix& matrix)
    : m_(matrix),
      weight_(static_cast<size_t>(direct_rows(matrix.weight) ? 0 : matrix.weight.cols)),
      moment_(static_cast<size_t>(matrix.codes == nullptr ? 0 : matrix.weight.cols)) {
  const int64_t blocks = (matrix.weight.cols + kRandomBlock - 1) / kRandomBlock;
  if (!weight_.empty() || !moment_.empty()) {
    random_.resize(static_cast<size_t>(blocks * kRandomBlock));
  }
}

void AdamRows::update(int64_t row, const float* gradient, int64_t next) {
  const int64_t at = m_.touched_at[row];
  const bool touched = gradient != nullptr && adam_table().any_nonzero(gradient, m_.weight.cols);
  if (!touched && (at <= 0 || m_.step - at > m_.tail)) return;
  const int64_t current = std::min(at + m_.tail, m_.step - 1);
  step_row(row, touched ? gradient : nullptr, m_.step - current, next);
  if (touched) m_.touched_at[row] = m_.step;
}

RowAhead AdamRows::moments_of(int64_t row) const {
  if (row < 0) return {nullptr, 0};
  if (m_.codes != nullptr) return {m_.codes + row * m_.exp_avg_sq_stride, 1};
  return {m_.exp_avg_sq + row * m_.exp_avg_sq_stride, sizeof(float)};
}

void AdamRows::step_row(int64_t row, const float* gradient, int64_t gap, int64_t next) {
  const AdamRowTable& table = adam_table();
  const int64_t cols = m_.weight.cols;
  float* w = static_cast<float*>(const_cast<void*>(m_.weight.row(row)));
  if (!weight_.empty()) {
    w = weight_.data();
    load_rows(m_.weight, row, 1, w, cols);
  }
  float* v = moment_.data();
  if (m_.codes == nullptr) {
    v = m_.exp_avg_sq + row * m_.exp_avg_sq_stride;
  } else {
    table.decode(m_.codes + row * m_.exp_avg_sq_stride, m_.exponents + row * m_.blocks, cols, v);
  }
  AdamScalars s = m_.scalars;
  s.decay1 = power(m_.beta1, gap);
  s.decay2 = power(m_.beta2, gap);
  float products[2];
  if (m_.remove_parallel && gradient != nullptr) {
    table.dots(gradient, w, cols, products);
    s.parallel = products[1] == 0 ? 0 : products[0] / products[1];
  }
  float* m = m_.exp_avg == nullptr ? nullptr : m_.exp_avg + row * m_.exp_avg_stride;
  table.update(s, gradient, m, v, w, cols, moments_of(next));
  if (m_.unit_norm) {
    table.dots(w, w, cols, products);
    if (products[1] != 0) table.divide(std::sqrt(products[1]), w, cols);
  }
  store(row);
}

void AdamRows::store(int64_t row) {
  const AdamRowTable& table = adam_table();
  const int64_t cols = m_.weight.cols;
  if (!random_.empty()) {
    table.random(m_.seed, static_cast<uint64_t>(row), static_cast<uint64_t>(m_.step), cols,
                 random_.data());
  }
  if (!moment_.empty()) {
    table.encode(moment_.data(), random_.data(), cols, m_.codes + row * m_.exp_avg_sq_stride,
                 m_.exponents + row * m_.blocks);
  }
  if (!weight_.empty()) {
    table.round_bf16(weight_.data(), random_.data(), cols,
                     static_cast<uint16_t*>(const_cast<void*>(m_.weight.row(row))));
  }
}

}  // namespace gemmascope_fast
