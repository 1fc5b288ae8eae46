"""The loopback server behaves like the Hub for its client and for Diffusers."""

import os
import subprocess
import sys
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_server import GIT_ATTRIBUTES
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

README = b"---\nlicense: mit\nlibrary_name: diffusers\ntags:\n- digits\n---\n# Digits\n"
FILES = {
    "README.md": README,
    "unet/model.safetensors": b"small, but of a kind that the Hub keeps in LFS",
    "samples.raw": bytes(range(256)) * 40_000,  # not a suffix of LFS, but 10 MB
    "notes/empty.bin": b"",
    "notes/naïve name.txt": "ünïcode".encode(),
}


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_writer")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "folder", FILES)


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_folder(folder: str | Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def run(script: str, environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("repo_type, prefix", [("model", ""), ("dataset", "datasets/"), ("space", "spaces/")])
def test_upload_and_download(hub, api, folder, tmp_path, repo_type, prefix):
    typed = partial(dict, repo_type=repo_type)
    url = api.create_repo("user/repo", space_sdk="gradio" if repo_type == "space" else None, **typed())
    assert (url, url.repo_id, url.repo_type) == (f"{hub.url}/{prefix}user/repo", "user/repo", repo_type)

    commit = api.upload_folder(repo_id="user/repo", folder_path=folder, **typed())
    repo = hub.repos[f"{prefix}user/repo"]
    assert repo.files == FILES | {".gitattributes": GIT_ATTRIBUTES}
    assert commit.oid == repo.head

    info = api.repo_info("user/repo", **typed())
    assert (info.id, info.author, info.sha, info.private) == ("user/repo", "user", repo.head, False)
    assert (info.tags, info.card_data.license) == (["digits"], "mit")
    assert [file.rfilename for file in info.siblings] == sorted(repo.files)
    assert getattr(info, "sdk", None) == ("gradio" if repo_type == "space" else None)

    path = api.snapshot_download("user/repo", cache_dir=tmp_path / "cache", **typed())
    assert read_folder(path) == repo.files
    assert Path(path).name == repo.head

    api.delete_repo("user/repo", **typed())
    assert not hub.repos and not api.repo_exists("user/repo", **typed())


def test_large_and_binary_files_go_through_lfs(hub, api, folder):
    api.create_repo("user/repo")
    api.upload_folder(repo_id="user/repo", folder_path=folder)
    uploads = sorted(path for method, path in hub.requests if method == "PUT")
    large = ["samples.raw", "unet/model.safetensors"]
    assert uploads == sorted(f"/lfs-objects/{sha256(FILES[name]).hexdigest()}" for name in large)

    tree = {file.path: file for file in api.list_repo_tree("user/repo", recursive=True)}
    assert {name: file.size for name, file in tree.items()} == {
        name: len(content) for name, content in hub.repos["user/repo"].files.items()
    }
    assert sorted(name for name, file in tree.items() if file.lfs) == large
    for name in large:
        assert tree[name].lfs.sha256 == sha256(FILES[name]).hexdigest()

    # the keys of the cache of `hf_hub_download`
    metadata = api.get_hf_file_metadata(url=f"{hub.url}/user/repo/resolve/main/samples.raw")
    assert metadata.etag == sha256(FILES["samples.raw"]).hexdigest()
    assert (metadata.size, metadata.commit_hash) == (len(FILES["samples.raw"]), hub.repos["user/repo"].head)
    assert metadata.xet_file_data is None


def test_second_commit(hub, api, folder, tmp_path):
    """Files are added, changed and deleted; unchanged ones are neither uploaded nor downloaded again."""
    download = partial(api.snapshot_download, "user/repo", cache_dir=tmp_path / "cache")
    api.create_repo("user/repo")
    first = api.upload_folder(repo_id="user/repo", folder_path=folder)
    before = read_folder(download())

    changes = {"README.md": README + b"More.\n", "unet/model.safetensors": b"trained", "new.txt": b"new"}
    second_folder = write_folder(tmp_path / "second", changes | {"samples.raw": FILES["samples.raw"]})
    hub.requests.clear()
    api.upload_folder(repo_id="user/repo", folder_path=second_folder, delete_patterns="notes/*")
    assert sum(method == "PUT" for method, _ in hub.requests) == 1

    hub.requests.clear()
    after = read_folder(download())
    assert after == {name: content for name, content in (before | changes).items() if not name.startswith("notes/")}
    fetched = {path.split("/", 5)[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == set(changes)
    assert read_folder(download(revision=first.oid)) == before

    api.upload_folder(repo_id="user/repo", folder_path=second_folder)  # nothing new
    assert len(hub.repos["user/repo"].commits) == 3  # creation and two uploads


def test_delete_operations(hub, api):
    api.create_repo("user/repo")
    names = ["a.txt", "b/c.txt", "b/d/e.txt", "bb.txt"]
    api.create_commit("user/repo", [CommitOperationAdd(name, name.encode()) for name in names], commit_message="add")
    deletions = [CommitOperationDelete("a.txt"), CommitOperationDelete("b/")]
    api.create_commit("user/repo", deletions, commit_message="delete")
    assert sorted(hub.repos["user/repo"].files) == [".gitattributes", "bb.txt"]
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("a.txt", "user/repo")
    with pytest.raises(HfHubHTTPError) as error:
        api.delete_file("bb.txt", "user/repo", parent_commit="0" * 40)
    assert error.value.response.status_code == 412


def test_client_in_a_subprocess(hub, folder, tmp_path):
    """The variables of `HubServer.environment` suffice."""
    script = """
import sys
from huggingface_hub import create_repo, hf_hub_download, snapshot_download, upload_folder, whoami

repo_id = create_repo("repo", private=True).repo_id
assert repo_id == f"{whoami()['name']}/repo"
upload_folder(repo_id=repo_id, folder_path=sys.argv[1])
snapshot_download(repo_id, local_dir=sys.argv[2])
print(hf_hub_download(repo_id, "README.md"))
"""
    run(script, hub.environment(tmp_path / "home", "hf_writer"), str(folder), str(tmp_path / "snapshot"))
    files = {name: (tmp_path / "snapshot" / name).read_bytes() for name in hub.repos["user/repo"].files}
    assert files == FILES | {".gitattributes": GIT_ATTRIBUTES}
    assert (tmp_path / "home/hub/models--user--repo").is_dir()


@pytest.mark.slow
def test_diffusers(hub, api, tmp_path):
    """A stock pipeline is loaded from the server by its name, and pushed to it under another."""
    unet = UNet2DModel(
        sample_size=4,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    api.create_repo("user/ddpm")
    api.upload_folder(repo_id="user/ddpm", folder_path=tmp_path / "pipeline")
    hub.requests.clear()
    script = """
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("user/ddpm")
assert type(pipeline).__name__ == "DDPMPipeline"
pipeline.push_to_hub("user/copy", private=True)
"""
    run(script, hub.environment(tmp_path / "home", "hf_writer"))
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.repos["user/copy"].files[weights] == hub.repos["user/ddpm"].files[weights]
    assert hub.repos["user/copy"].private

    revision = hub.repos["user/ddpm"].head
    fetched = Counter(path for method, path in hub.requests if method == "GET" and "/user/ddpm/resolve/" in path)
    names = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", weights]
    assert fetched == {f"/user/ddpm/resolve/{revision}/{name}": 1 for name in names}


def test_private_repository(hub, api):
    """For everyone except its owner it does not exist."""
    api.create_repo("user/secret", private=True)
    api.upload_file(repo_id="user/secret", path_in_repo="a.txt", path_or_fileobj=b"a")
    assert api.model_info("user/secret").private and api.file_exists("user/secret", "a.txt")
    for token in (False, "hf_reader"):
        stranger = HfApi(endpoint=hub.url, token=token)
        assert not stranger.repo_exists("user/secret") and not stranger.file_exists("user/secret", "a.txt")
        for name in ("secret", "missing"):
            with pytest.raises(RepositoryNotFoundError) as error:
                stranger.model_info(f"user/{name}")
            assert error.value.response.status_code == (404 if token else 401)


def test_what_is_missing(api, tmp_path):
    api.create_repo("user/repo")
    download = partial(api.hf_hub_download, cache_dir=tmp_path)
    assert api.file_exists("user/repo", ".gitattributes") and not api.file_exists("user/repo", "missing.txt")
    with pytest.raises(EntryNotFoundError):
        download("user/repo", "missing.txt")
    with pytest.raises(RevisionNotFoundError):
        download("user/repo", ".gitattributes", revision="branch")
    with pytest.raises(RepositoryNotFoundError):
        download("user/missing", "README.md")
    with pytest.raises(RepositoryNotFoundError):
        api.snapshot_download("user/missing", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(repo_id="user/missing", path_in_repo="a.txt", path_or_fileobj=b"a")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("user/missing")


def test_what_is_not_allowed(hub, api):
    def status(call, *arguments, **settings) -> int:
        with pytest.raises(HfHubHTTPError) as error:
            call(*arguments, **settings)
        return error.value.response.status_code

    api.create_repo("user/repo")
    assert status(api.create_repo, "user/repo") == 409
    assert api.create_repo("user/repo", exist_ok=True).repo_id == "user/repo"
    assert status(api.create_repo, "reader/repo") == 403
    assert status(api.create_repo, "user/other", token=False) == 401
    assert status(api.create_repo, "user/other", token="hf_wrong") == 401
    assert status(api.whoami, token="hf_wrong") == 401
    assert status(api.model_info, "user/repo", token="hf_wrong") == 401  # even though it is public
    upload = partial(api.upload_file, repo_id="user/repo", path_in_repo="a.txt", path_or_fileobj=b"a")
    assert status(upload, token="hf_reader") == 403
    assert status(upload, token=False) == 401
    assert list(hub.repos) == ["user/repo"] and len(hub.repos["user/repo"].commits) == 1


def test_what_the_server_does_not_speak(api):
    """The server refuses what it does not support, and never commits to another place instead."""
    api.create_repo("user/repo")
    upload = partial(api.upload_file, repo_id="user/repo", path_in_repo="a.txt", path_or_fileobj=b"a")
    with pytest.raises(HfHubHTTPError, match="neither branches nor pull requests"):
        upload(create_pr=True)
    with pytest.raises(HfHubHTTPError, match="neither branches nor pull requests"):
        upload(revision="branch")
    with pytest.raises(HfHubHTTPError, match="whole repositories only"):
        list(api.list_repo_tree("user/repo"))
    with pytest.raises(HfHubHTTPError, match="does not speak GET /api/models/user/repo/refs"):
        api.list_repo_refs("user/repo")


def test_readme_metadata(hub, api):
    upload = partial(api.upload_file, repo_id="user/repo", path_in_repo="README.md")
    api.create_repo("user/repo")
    with pytest.raises(ValueError, match="to be a YAML mapping"):
        upload(path_or_fileobj=b"---\n[tags: digits\n---\n")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        upload(path_or_fileobj=b"# Digits\n")
    upload(path_or_fileobj=README)
    info = api.model_info("user/repo")
    assert (info.library_name, info.tags) == ("diffusers", ["digits"])


def test_lfs_content_has_to_be_what_it_says(hub, api):
    """A commit cannot name content that was not uploaded, and no content can be uploaded under another's name."""
    api.create_repo("user/repo")
    operation = CommitOperationAdd("model.safetensors", b"weights")
    operation._upload_mode, operation._is_uploaded = "lfs", True  # the client now believes that it has uploaded it
    with pytest.raises(BadRequestError, match="not uploaded"):
        api.create_commit("user/repo", [operation], commit_message="weights")
    oid = sha256(b"weights").hexdigest()
    assert get_session().put(f"{hub.url}/lfs-objects/{oid}", content=b"other weights").status_code == 422
    assert not hub.lfs_objects and len(hub.repos["user/repo"].commits) == 1
