"""`load` by an id on the Hugging Face Hub: what it asks the Hub's library for, and its errors.

The library is real, and its cache is; what goes to the network is replaced, or forbidden.
"""

import sys
from fnmatch import fnmatch

import pytest
import torch
from attacks import arrays
from attacks.published import CONFIG, layers, scope_1, scope_2, scope_2_layers

from gemmascope_fast import SAE, CrossLayerTranscoder, Transcoder, load

pytestmark = pytest.mark.filterwarnings("ignore:.*threshold has negative values")
hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

REPOSITORY = "google/gemma-scope-2-27b-it"
FOLDER = "resid_post/layer_31_width_262k_l0_medium"
COMMIT = "0" * 39 + "a"
PUBLISHED = [
    "README.md",
    "examples.safetensors",
    *(f"{FOLDER}/{name}.safetensors" for name in ("params", "examples")),
    f"{FOLDER}/config.json",
    *(f"{FOLDER}_seed_1/{name}.safetensors" for name in ("params", "examples")),
    *(f"clt/width_262k_l0_big/params_layer_{i}.safetensors" for i in range(3)),
    "clt/width_262k_l0_big/examples.safetensors",
    "clt/width_262k_l0_big/config.json",
    "layer_20/width_16k/average_l0_71/params.npz",
]


def wanted(call):
    """The published files that a call of `snapshot_download` downloads."""
    allowed, ignored = call["allow_patterns"], call["ignore_patterns"]
    return [
        name
        for name in PUBLISHED
        if any(fnmatch(name, p) for p in allowed) and not any(fnmatch(name, p) for p in ignored)
    ]


@pytest.fixture
def online(tmp_path, monkeypatch):
    """The Hub's answer is a folder; what it was asked is in `calls`."""
    calls = []

    def snapshot_download(repository, **options):
        calls.append({"repository": repository} | options)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return calls


def test_two_spellings_of_one_artefact(online, tmp_path):
    scope_2(tmp_path / "snapshot" / FOLDER, arrays(), **CONFIG)
    modules = [
        load(f"{REPOSITORY}/{FOLDER}"),
        load(f"{REPOSITORY}/{FOLDER}/", revision=COMMIT),
        load(REPOSITORY, FOLDER, dtype=torch.bfloat16),
        load(REPOSITORY + "/resid_post", "layer_31_width_262k_l0_medium"),
        SAE.from_pretrained(REPOSITORY, FOLDER, revision="v1", latents=slice(2, 5)),
    ]
    assert [call["revision"] for call in online] == [None, COMMIT, None, None, "v1"]
    for call in online:
        assert call["repository"] == REPOSITORY
        assert wanted(call) == [f"{FOLDER}/params.safetensors", f"{FOLDER}/config.json"]
    assert torch.equal(modules[0].W_enc, torch.from_numpy(arrays()["w_enc"]))
    assert modules[0].metadata["model_name"] == CONFIG["model_name"]
    assert modules[2].W_enc.dtype == torch.bfloat16 and modules[4].d_sae == 3


def test_several_layers_and_archives(online, tmp_path):
    folder = "clt/width_262k_l0_big"
    scope_2_layers(tmp_path / "snapshot" / folder, layers(), type="clt")
    assert type(load(REPOSITORY, folder)) is CrossLayerTranscoder
    names = [*(f"params_layer_{i}.safetensors" for i in range(3)), "config.json"]
    assert wanted(online[0]) == [f"{folder}/{name}" for name in names]
    file = "layer_20/width_16k/average_l0_71/params.npz"
    scope_1(tmp_path / "snapshot" / file, arrays())
    for source in (
        ("google/gemma-scope-9b-pt-res", file),
        ("google/gemma-scope-9b-pt-res", file[:-11]),
    ):
        assert load(*source).metadata == {"l0": 71}
    assert wanted(online[1]) == wanted(online[2]) == [file]


def test_one_file_and_the_root_of_a_repository(online, tmp_path):
    scope_2(tmp_path / "snapshot", arrays(), type="transcoder")
    assert type(load("me/mine")) is Transcoder
    assert type(load("me/mine/params.safetensors")) is Transcoder
    assert online[0]["allow_patterns"][:2] == ["config.json", "params.safetensors"]
    assert online[1]["allow_patterns"] == ["config.json", "params.safetensors"]
    with pytest.raises(ValueError, match="source must be a folder, a params.safetensors or an"):
        load("me/mine/examples.safetensors")
    assert wanted(online[2]) == []


def test_a_local_folder_of_that_name_wins(online, tmp_path):
    scope_2(tmp_path / REPOSITORY / FOLDER, arrays(), **CONFIG)
    for source in (
        (f"{REPOSITORY}/{FOLDER}",),
        (REPOSITORY, FOLDER),
        (tmp_path / REPOSITORY, FOLDER),
    ):
        assert load(*source).d_sae == 10
    with pytest.raises(
        ValueError, match="revision is for the Hugging Face Hub, and google/.* local"
    ):
        load(REPOSITORY, FOLDER, revision=COMMIT)
    with pytest.raises(FileNotFoundError, match="source google/.*/elsewhere does not exist"):
        load(REPOSITORY, "elsewhere")
    assert online == []


@pytest.mark.parametrize(
    "source, subfolder",
    [
        ("nothing", None),
        ("./google/gemma", FOLDER),
        ("/google/gemma", FOLDER),
        ("google/../etc", "passwd"),
        ("google/gemma/a*", None),
        ("google/gemma", "a[b]"),
        ("google/gemma", ".hidden/x"),
        ("~/weights", FOLDER),
        ("google//gemma", FOLDER),
    ],
)
def test_what_is_no_id_is_a_local_path(source, subfolder, online):
    with pytest.raises(FileNotFoundError, match="does not exist: expected .* as owner/name/folder"):
        load(source, subfolder)
    assert online == []


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"subfolder": "../up"}, ValueError, "subfolder must be below source"),
        ({"subfolder": "a/../../up"}, ValueError, "subfolder must be below source"),
        ({"subfolder": "/etc"}, ValueError, "subfolder must be below source"),
        ({"subfolder": ""}, TypeError, "subfolder must be a non-empty str or None, got ''"),
        ({"subfolder": 3}, TypeError, "subfolder must be a non-empty str or None, got 3"),
        ({"revision": 3}, TypeError, "revision must be a non-empty str or None, got 3"),
    ],
)
def test_arguments(options, error, message, online, tmp_path):
    for source in (REPOSITORY, tmp_path):
        with pytest.raises(error, match=f"load: {message}"):
            load(source, **options)
    assert online == []


def http(kind):
    """An error as the library raises it."""
    try:
        import httpx2 as httpx
    except ModuleNotFoundError:
        httpx = pytest.importorskip("httpx", reason="huggingface_hub's HTTP library is another")
    request = httpx.Request("GET", "https://huggingface.co")
    return kind("a reason", response=httpx.Response(403, request=request))


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("GatedRepoError", PermissionError, "is gated: accept its terms .* `hf auth login`"),
        ("RepositoryNotFoundError", FileNotFoundError, "neither a local path nor in a repository"),
        ("RevisionNotFoundError", FileNotFoundError, "there is no revision 'v9'"),
        ("LocalEntryNotFoundError", FileNotFoundError, "not in the local cache .*'v9'.* offline"),
        ("OfflineModeIsEnabled", ConnectionError, "the Hugging Face Hub refused: a reason"),
        ("HfHubHTTPError", ConnectionError, "the Hugging Face Hub refused: a reason"),
    ],
)
def test_errors_of_the_hub(name, error, message, monkeypatch, tmp_path):
    kind = getattr(hub.utils, name)
    made = http(kind) if issubclass(kind, hub.utils.HfHubHTTPError) else kind("a reason")

    def fail(*args, **options):
        raise made

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(error, match=f"load: {REPOSITORY}/{FOLDER}.*{message}"):
        load(REPOSITORY, FOLDER, revision="v9")


def test_a_folder_that_the_repository_lacks(online, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for folder in ("resid_post/layer_99_width_16k_l0_big", "resid_post/params.safetensors"):
        with pytest.raises(
            FileNotFoundError, match=f"{folder}: the repository has no artefact there"
        ):
            load(REPOSITORY, folder)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="is no local path, .* pip install huggingface_hub"):
        load(REPOSITORY, FOLDER)


# ---- the library's own cache, offline

OFFLINE = """
import socket
def refuse(*args, **kwargs): raise AssertionError("offline means no connection")
socket.socket.connect = refuse
import gemmascope_fast as gsf
for folder, revision in CALLS:
    try:
        print(type(gsf.load("google/gemma-scope-2-27b-it", folder, revision=revision)).__name__)
    except FileNotFoundError as error:
        print(str(error).replace(chr(10), " "))
"""


@pytest.fixture
def cache(tmp_path):
    """As the library lays it out: snapshots are links into blobs, refs name commits."""
    repository = tmp_path / "cache" / "models--google--gemma-scope-2-27b-it"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    scope_2(snapshot / FOLDER, arrays(), **CONFIG)
    scope_2_layers(snapshot / "clt/width_262k_l0_big", layers()[:2], type="clt")
    for i, file in enumerate([p for p in snapshot.rglob("*") if p.is_file()]):
        blob = repository / "blobs" / f"{i:040x}"
        file.rename(blob)
        file.symlink_to(
            "../" * (len(file.relative_to(repository).parts) - 1) + f"blobs/{blob.name}"
        )
    return tmp_path / "cache"


def test_the_cache_offline(cache, run_python):
    calls = {
        (FOLDER, None): "SAE",
        (FOLDER, COMMIT): "SAE",
        (FOLDER, "b" * 40): "is not in the local cache",
        ("other", None): "it is not in the local cache and the Hub is offline",
        ("clt/width_262k_l0_big", None): "params_layer_2.safetensors is missing",
    }
    code = f"CALLS = {list(calls)!r}\n{OFFLINE}"
    printed = run_python(code, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(cache)).splitlines()
    for line, expected in zip(printed, calls.values(), strict=True):
        assert expected in line
