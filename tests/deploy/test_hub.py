"""Names on a hub, asked of a small hub on loopback."""

import json
from pathlib import Path

import pytest
from fake_hub import COMMIT, serving_hub

from glm4_deploy import hub as module
from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import BundleError, CheckpointError
from glm4_runtime.session import Session

NAME = "owner/tiny-glm"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub without repositories; the library asks it, and keeps its cache in the test's folder."""
    from huggingface_hub import constants

    with serving_hub() as served:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        set_endpoint(monkeypatch, served.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield served


def set_endpoint(monkeypatch, url):
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def published(hub, tiny_checkpoint):
    """The hub with the tiny checkpoint, and beside it what must not be downloaded."""
    files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    hub.repositories[NAME] = files | {
        "pytorch_model.bin": b"a pickle",
        "README.md": b"text",
        "original/weights.safetensors": b"another copy",
        "tiny.Q4_0.gguf": b"GGUF",
    }
    return hub


def test_only_what_is_needed_is_downloaded(published, tiny_checkpoint):
    folder = module.local_folder(NAME)
    for path in tiny_checkpoint.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert set(published.downloaded()) == {path.name for path in tiny_checkpoint.iterdir()}
    published.requests.clear()
    assert module.local_folder(NAME) == folder
    assert published.downloaded() == []


def test_a_folder_of_that_name_wins(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert module.local_folder(NAME) == Path(NAME)
    assert published.requests == []
    with pytest.raises(CheckpointError, match="--revision is for a name on the hub"):
        module.local_folder(NAME, "main")


def test_shards_are_those_of_the_index(hub):
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    hub.repositories[NAME] = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001.safetensors": b"one",
        "model-00002.safetensors": b"two",
        "model-00003.safetensors": b"of another version",
    }
    seen = []
    folder = module.download(NAME, progress=lambda *said: seen.append(said))
    assert (folder / "model-00002.safetensors").read_bytes() == b"two"
    assert not (folder / "model-00003.safetensors").exists()
    assert seen[-1] == ("download", 6, 6)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "a/b.safetensors", "*.bin", 3])
def test_an_index_names_files_beside_it(hub, name):
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.repositories[NAME] = {"config.json": b"{}", "model.safetensors.index.json": index}
    with pytest.raises(CheckpointError, match="not a safetensors file beside it"):
        module.download(NAME)


def test_a_broken_download_goes_on(published, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    size = len(published.repositories[NAME]["model.safetensors"])
    published.break_after = size // 2
    folder = module.download(NAME)
    assert (folder / "model.safetensors").read_bytes() == published.repositories[NAME]["model.safetensors"]
    ranges = [asked for _, path, asked in published.requests if path.endswith("/model.safetensors") and asked]
    assert any(int(asked.removeprefix("bytes=").rstrip("-")) > size // 3 for asked in ranges)


def test_inspect_reads_headers_only(published, run):
    code, out, _ = run("inspect", NAME, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["path"] == NAME
    assert facts["config"]["num_hidden_layers"] == 2
    spans = [
        [int(x) for x in asked.removeprefix("bytes=").split("-")]
        for method, path, asked in published.requests
        if method == "GET" and path.endswith("/model.safetensors")
    ]
    assert spans
    assert all(last - first < 200_000 for first, last in spans)


def test_export_and_validate_take_names(published, run, tmp_path):
    code, _, err = run("export", NAME, tmp_path / "bundle", "--precision", "fp32", "--no-parity")
    assert code == 0, err
    assert "download" in err
    folder = module.download(NAME)
    assert run("export", NAME, "--print-key") == run("export", folder, "--print-key")
    validate = ("validate", tmp_path / "bundle", "--no-greedy", "--no-gate", "--max-tokens", 64, "--json")
    code, out, err = run(*validate, "--reference", NAME)
    assert code == 0, err
    assert json.loads(out)["comparisons"][0]["metrics"]["kl_mean"] < 1e-6
    for arguments in (("export", NAME, tmp_path / "other"), (*validate, "--reference", NAME)):
        code, _, err = run(*arguments, "--revision", "nowhere")
        assert code == 1
        assert f"{NAME} has no revision 'nowhere'" in err


def test_what_the_hub_refuses_is_one_line(published, monkeypatch):
    published.repositories["owner/gated"] = published.repositories["owner/private"] = {"config.json": b"{}"}
    published.gated.add("owner/gated")
    published.private.add("owner/private")
    for name, message in (
        ("owner/absent", "no owner/absent on the hub, or it is private"),
        ("owner/private", "no owner/private on the hub, or it is private"),
        ("owner/gated", "owner/gated is gated: accept its terms"),
    ):
        with pytest.raises(CheckpointError, match=message) as told:
            module.download(name)
        assert "\n" not in str(told.value)
        assert len(str(told.value)) <= 500
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(CheckpointError, match=r"owner/private holds no model.safetensors"):
        module.download("owner/private")


@pytest.mark.parametrize(
    ("file", "message"), [("pytorch_model.bin", "holds pickles"), ("x.Q8_0.gguf", "holds GGUF files")]
)
@pytest.mark.parametrize("headers", [False, True])
def test_a_name_without_safetensors(hub, file, message, headers):
    hub.repositories[NAME] = {"config.json": b"{}", file: b"x"}
    opened = module.headers_only(NAME).__enter__ if headers else lambda: module.download(NAME)
    with pytest.raises(CheckpointError, match=message):
        opened()
    assert file not in hub.downloaded()


def test_offline_the_cache_serves(published, monkeypatch):
    from huggingface_hub import constants

    folder = module.download(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    published.requests.clear()
    assert module.download(NAME) == folder
    assert published.requests == []
    with pytest.raises(CheckpointError, match="the hub cannot be reached, and owner/other is not whole"):
        module.download("owner/other")


def test_a_hub_that_is_not_there(hub, monkeypatch):
    set_endpoint(monkeypatch, "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(CheckpointError, match="the hub cannot be reached") as told:
        module.download(NAME)
    assert "\n" not in str(told.value)


def test_a_place_that_is_taken_is_refused_before_the_download(published, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    for place, reason in (
        ("taken", "is not a bundle"),
        (".", "is the current folder"),
        ("owner/../taken", "taken"),
    ):
        code, _, err = run("export", NAME, place, "--force")
        assert (code, err.count("\n")) == (1, 1)
        assert reason in err
    assert published.requests == []


def test_what_a_name_looks_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(map(module.is_hub_name, ("THUDM/GLM-4-9B-0414", "zai-org/GLM-Z1-9B-0414", "a/b_c.d")))
    names = ("glm", "./a/b", "../a", "/a/b", "a/b/c", "a/", "-a/b", "a b/c", "a/b\n", "a/..")
    assert not any(map(module.is_hub_name, names))


def test_the_library_is_named_where_it_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Exception, match=r"pip install .*\[hub\]'"):
        module.download(NAME)


def test_the_commit_is_the_folder(published):
    assert module.download(NAME, COMMIT) == module.download(NAME, "main")
    assert module.download(NAME).name == COMMIT


@pytest.fixture
def published_bundle(hub, tiny_bundles):
    """The hub with a bundle, and beside it what must not be downloaded."""
    folder = tiny_bundles["ort"]
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    hub.repositories[NAME] = files | {"README.md": b"text", "other.bin": b"x"}
    return hub


def test_a_bundle_of_the_hub_is_opened_like_a_folder(published_bundle):
    folder = module.local_bundle(NAME)
    with Session.open(folder, verify=True) as session:
        assert session.manifest.task == "causal-lm"
    wanted = {name.rpartition("/")[2] for name in read_manifest(folder).files}
    assert set(published_bundle.downloaded()) == {"manifest.json", *wanted}
    published_bundle.requests.clear()
    assert module.local_bundle(NAME) == folder
    assert published_bundle.downloaded() == []


def test_a_checkpoint_of_the_hub_is_no_bundle(published):
    with pytest.raises(BundleError, match=f"holds no manifest.json.*glm4-deploy export {NAME}"):
        module.local_bundle(NAME)


def test_a_folder_stays_a_folder_and_takes_no_revision(tiny_bundles):
    assert module.local_bundle(tiny_bundles["ort"]) == tiny_bundles["ort"]
    with pytest.raises(CheckpointError, match="--revision is for a name on the hub"):
        module.local_bundle(tiny_bundles["ort"], "main")


def test_serve_names_the_model_after_its_repository(published_bundle, monkeypatch, run):
    from glm4_runtime.server import run as module

    served = []
    monkeypatch.setattr(
        module,
        "open_and_serve",
        lambda bundle, options, **_: served.append((bundle, options.served_name)),
    )
    assert run("serve", NAME)[0] == 0
    ((folder, name),) = served
    assert folder.name == COMMIT
    assert name == "tiny-glm"


def test_serve_downloads_adapters(published_bundle, demo_adapters, monkeypatch, run):
    from glm4_runtime.server import run as module

    published_bundle.repositories["owner/poet"] = {
        path.name: path.read_bytes() for path in demo_adapters["poet"].iterdir()
    }
    served = []
    monkeypatch.setattr(
        module, "open_and_serve", lambda _, options, **__: served.append(options.adapter_folders)
    )
    assert run("serve", NAME, "--lora", "poet=owner/poet")[0] == 0
    ((name, folder),) = served[0].items()
    assert name == "poet"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (Path(folder) / file).read_bytes() == (demo_adapters["poet"] / file).read_bytes()
