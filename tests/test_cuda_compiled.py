"""Every CUDA kernel of the built library: resources, and instructions that must or must not be."""

from __future__ import annotations

import json
import re

import compiling_cuda as compiled
import pytest

if compiled.missing():
    pytest.skip(compiled.missing(), allow_module_level=True)

ARCHITECTURES = compiled.architectures()
SLACK = 1.05
"""Instructions may grow by this factor: compiler releases schedule differently."""

WIDE_LOAD = r"LDG\.E\.(\w+\.)*128"
WIDE_COPY = r"LDGSTS\.E\.(\w+\.)*128"

MEANT: dict[str, dict[str, int]] = {
    "encode_sm90_kernel<__": {r"HGMMA\.64x256x16\.F32": 4, "UTMALDG": 2},
    "encode_sm90_kernel<signed char": {r"IGMMA\.64x256x32\.S8\.S8": 4, "UTMALDG": 2},
    "hot_product_kernel": {r"HGMMA\.64x256x16\.F32": 4, "UTMALDG": 2},
    "hot_(transpose|gather)_kernel": {WIDE_LOAD: 1, r"STG\.E\.128": 1},
    "(rescore|decide_rows)_kernel": {WIDE_LOAD: 8, r"LDS\.128": 4},
    "(encode_few|few_keys)_kernel": {r"HMMA\.16816\.F32": 8, WIDE_COPY: 15, r"LDS\.128": 18},
    "encode_tile_kernel<(__half|__nv_bfloat16)": {r"HMMA\.16816\.F32": 24, WIDE_COPY: 1},
    "encode_tile_kernel<float": {"FFMA": 64, r"LDS\.128": 8, WIDE_COPY: 1},
    "token_pass_kernel<[01]>": {WIDE_LOAD: 8, r"STG\.E\.128": 1},
    "token_pass_kernel<2>": {r"STG\.E\.128": 1},
    "(pre_at|entry_dots)_kernel": {WIDE_LOAD: 12},
    "feature_(pass|pieces)_kernel": {WIDE_COPY: 30, r"LDS\.128": 16, r"STG\.E\.128": 2},
    r"feature_(pass_kernel<\d, StoreGradients|pieces_kernel)": {r"STG\.E\.128": 4},
    "adam_(step|slab)_kernel": {WIDE_LOAD: 1},
}
"""Expressions for a kernel's name; for the opcodes it is built on, from their beginning; how many
there are at least. Loads of 16 bytes are as many as are in flight at once."""

ONLY = dict.fromkeys(
    ("encode_sm90_kernel<__", "encode_sm90_kernel<signed char", "hot_product_kernel"), "sm_90a"
)
"""Kernels of one architecture: elsewhere nothing is left of them."""

ROUNDED = {"adam_step_kernel", "adam_slab_kernel"}
"""Kernels whose bits other backends share: each operation rounds, what is fused is written so."""


@pytest.fixture(scope="module", autouse=True)
def read_side_by_side(request: pytest.FixtureRequest) -> None:
    """Most of the time is the disassembler's."""
    items = [i for i in request.session.items if i.path == request.path]
    wanted = {i.callspec.params.get("architecture") for i in items if hasattr(i, "callspec")}
    compiled.read_side_by_side(wanted - {None})


def test_every_listed_architecture_has_a_budget() -> None:
    assert {"sm_80", "sm_90a", "sm_120a"} < compiled.listed()
    assert compiled.listed() == set(json.loads(compiled.BUDGET.read_text()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_its_budget(architecture: str) -> None:
    found = compiled.reports(architecture)
    budgets = json.loads(compiled.BUDGET.read_text())
    if architecture not in budgets:
        pytest.skip(f"no budget for {architecture}: `python tests/compiling_cuda.py` writes one")
    budget = budgets[architecture]
    assert sorted(found) == sorted(budget), "kernels without a budget, or the other way round"
    over = {
        f"{name}, {key}": f"{now}, budget {budget[name][key]}"
        for name, report in found.items()
        for key, now in report.measured.items()
        if now > budget[name][key] * (SLACK if key == "instructions" else 1)
    }
    assert not over, f"`python tests/compiling_cuda.py` writes the budget anew: {over}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_the_sources_is_built(architecture: str) -> None:
    sources = [path.read_text() for path in (compiled.ROOT / "csrc" / "cuda").glob("*.cu*")]
    named = {
        name
        for text in sources
        for name in re.findall(r"__global__[^{;]*?\b(\w+_kernel)\(", text, re.S)
    }
    assert sum(text.count("__global__") for text in sources) == len(named)
    assert {compiled.stem(name) for name in compiled.reports(architecture)} == named


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_in_local_memory(architecture: str) -> None:
    # Spilled registers, and arrays indexed at run time.
    local = {
        name: (report.stack, report.count("LDL|STL"))
        for name, report in compiled.reports(architecture).items()
        if report.stack or report.count("LDL|STL")
    }
    assert local == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_instruction_is_lost_to_the_assembler(architecture: str) -> None:
    lost = {n: r.never for n, r in compiled.reports(architecture).items() if r.never}
    assert lost == {}


FALSE = "PLOP3.LUT P1, PT, PT, PT, PT, 0x8, 0x0 ;"


@pytest.mark.parametrize(
    "between, seen",
    [
        ("", True),
        ("@P0 IADD3 R1, R2, R3, RZ ;", True),
        ("@P0 ELECT P1, URZ, PT ;", False),
        ("R2P PR, R4, 0x7f ;", False),
        ("CALL.REL.NOINC 0x500 ;", False),
        ("BRA 0x30 ;", False),
        ("WARPSYNC.COLLECTIVE R1, 0x30 ;", False),
    ],
)
def test_what_is_never_executed(between: str, seen: bool) -> None:
    code = f"""
        /*0010*/                   {FALSE}
        /*0020*/                   {between or "NOP ;"}
        /*0030*/               @P1 R2UR UR27, R7 ;
    """
    assert compiled.never_executed(code) == (("0030: @P1 R2UR UR27, R7",) if seen else ())


def test_what_may_be_executed() -> None:
    found = [
        FALSE.replace("0x8, 0x0", "0x80, 0x8"),  # true
        FALSE.replace("PT, 0x8", "P0, 0x8"),
        "@P0 " + FALSE,
        FALSE.replace("P1", "P2"),
    ]
    for made in found:
        assert not compiled.never_executed(f"  /*0000*/ {made}\n  /*0010*/ @P1 NOP ;\n"), made
    labelled = f"  /*0000*/ {FALSE}\n.L_x_1:\n  /*0010*/ @P1 NOP ;\n"
    assert not compiled.never_executed(labelled)
    assert not compiled.never_executed(f"  /*0000*/ {FALSE}\n  /*0010*/ @!P1 NOP ;\n")
    assert compiled.never_executed(f"  /*0000*/ {FALSE}\n  /*0010*/ @P1 NOP ;\n")


@pytest.mark.skipif("sm_90a" not in ARCHITECTURES, reason="not built for sm_90a")
@pytest.mark.parametrize("kernel", ["rescore_kernel", "decide_rows_kernel", "quantise_kernel"])
def test_the_screened_encoders_leave_room_for_what_a_kernel_has_of_its_own(kernel: str) -> None:
    header = (compiled.ROOT / "csrc" / "cuda" / "encode_screened.h").read_text()
    left = int(re.findall(r"kScreenedOwnShared = (\d+);", header)[0])
    reserved = 1024  # by the system; no part of what a launch may ask for
    found = [r.shared for n, r in compiled.reports("sm_90a").items() if compiled.stem(n) == kernel]
    assert len(found) == 2 and max(found) - reserved <= left


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_sum_depends_on_the_order_of_threads(architecture: str) -> None:
    atomic = re.compile(r"(RED|ATOM)\w*\..*\b(BF16|F16|F32|F64)")
    for name, report in compiled.reports(architecture).items():
        assert [code for code in report.opcodes if atomic.match(code)] == [], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", MEANT)
def test_contains_the_instructions_it_is_built_on(kernel: str, architecture: str) -> None:
    found = {n: r for n, r in compiled.reports(architecture).items() if re.match(kernel, n)}
    assert found
    if ONLY.get(kernel, architecture) != architecture:
        assert all(report.instructions < 10 for report in found.values())
        return
    for name, report in found.items():
        counts = {opcode: report.count(opcode) for opcode in MEANT[kernel]}
        assert all(counts[opcode] >= least for opcode, least in MEANT[kernel].items()), (
            f"{name} has {counts}, of {MEANT[kernel]}"
        )


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    """PTX by kernel."""
    found = compiled.intermediate()
    if not found:
        pytest.skip("no architecture carries PTX")
    return found


def loose(text: str) -> list[str]:
    """Operations on float32 that the assembler may fuse, or that are not rounded to nearest."""
    return re.findall(r"\b(?:(?:mul|add|sub|div|sqrt)\.(?!rn)|\w+\.rn\.ftz)[.\w]*f32\b", text)


def test_the_optimizer_rounds_every_operation(ptx: dict[str, str]) -> None:
    found = {name: loose(text) for name, text in ptx.items() if compiled.stem(name) in ROUNDED}
    assert {compiled.stem(name) for name in found} == ROUNDED
    assert not any(found.values()), found


def test_the_fused_step_fuses_what_the_backward_does(ptx: dict[str, str]) -> None:
    # The update leaves nothing to the compiler. What it may fuse belongs to the sums.
    counts: dict[str, list[tuple[int, ...]]] = {}
    for name, text in ptx.items():
        if found := re.match(r"feature_pass_kernel<(\d)", name):
            plain = tuple(len(re.findall(rf"\b{op}\.f32\b", text)) for op in ("mul", "add"))
            counts.setdefault(found[1], []).append(plain)
    assert len(counts) > 1
    for kernels in counts.values():
        assert len(kernels) == 2 and len(set(kernels)) == 1, kernels


def test_what_may_be_fused() -> None:
    text = "mul.f32 a; add.rn.f32 b; fma.rn.f32 c; add.f64 d; add.rn.ftz.f32 e; sqrt.approx.f32 f"
    assert loose(text) == ["mul.f32", "add.rn.ftz.f32", "sqrt.approx.f32"]


def test_names_of_kernels() -> None:
    names = {
        "_ZN15gemmascope_fast22by_feature_keys_kernelENS_9ByFeatureE": "by_feature_keys_kernel",
        "_ZN15gemmascope_fast16adam_step_kernelILi64EEEvNS_8AdamViewENS_12AdamGradientE": (
            "adam_step_kernel<64>"
        ),
        "_ZN15gemmascope_fast16adam_slab_kernelILNS_8SlabWorkE2EEEvNS_8AdamViewE": (
            "adam_slab_kernel<2>"
        ),
    }
    assert {name: compiled.kernel(name) for name in names} == names


def test_what_a_line_of_assembly_says() -> None:
    text = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;           /* 0x0000df00ff017b82 */
                                                                     /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;   /* 0x0 */
        /*12340*/             @UP1 UTMALDG.2D [UR8], [UR4] ;         /* 0x000 */
    """
    assert compiled.INSTRUCTION.findall(text) == ["LDC", "LDG.E.128.CONSTANT", "UTMALDG.2D"]
