"""A Hugging Face Hub in a folder: what its client is asked is checked against the signatures of the real one."""

import fnmatch
import inspect
import shutil
from pathlib import Path

from huggingface_hub import HfApi


class Hub:
    """Repositories as folders. uploads: (repository, its type) of every upload; made: options of every repository."""

    def __init__(self, folder):
        self.folder, self.made, self.uploads, self.tokens, self.fails = folder, [], [], [], None

    def place(self, repo_id, repo_type="model"):
        return self.folder / repo_type / repo_id.replace("/", "--")

    def client(self, *args, **kwargs):
        """Stands where ``HfApi`` is."""
        given = inspect.signature(HfApi.__init__).bind(None, *args, **kwargs)
        self.tokens.append(given.arguments.get("token"))
        return Client(self)


class Client:
    def __init__(self, hub):
        self.hub = hub

    def __getattr__(self, name):
        real = inspect.signature(getattr(HfApi, name))

        def call(*args, **kwargs):
            given = real.bind(None, *args, **kwargs)
            if self.hub.fails is not None:
                raise self.hub.fails
            given.apply_defaults()
            return ANSWERS[name](self.hub, **{k: v for k, v in given.arguments.items() if k != "self"})

        return call


def create_repo(hub, *, repo_id, repo_type, private, exist_ok, space_sdk, **_):
    place = hub.place(repo_id, repo_type or "model")
    assert exist_ok or not place.exists()
    assert (space_sdk == "static") == (repo_type == "space")
    place.mkdir(parents=True, exist_ok=True)
    hub.made.append({"repo_id": repo_id, "private": private})


def upload_folder(hub, *, repo_id, folder_path, repo_type, delete_patterns, commit_message, **_):
    place = hub.place(repo_id, repo_type or "model")
    assert place.exists(), "a repository is made first"
    assert commit_message
    for old in [one for one in place.rglob("*") if one.is_file()]:
        if any(fnmatch.fnmatch(str(old.relative_to(place)), pattern) for pattern in delete_patterns):
            old.unlink()
    shutil.copytree(folder_path, place, dirs_exist_ok=True)
    hub.uploads.append((repo_id, repo_type))


def snapshot_download(hub, *, repo_id, repo_type, local_dir, allow_patterns, **_):
    place = hub.place(repo_id, repo_type or "model")
    if not place.exists():
        raise FileNotFoundError(f"404 for {repo_id} with authorization: Bearer hf_secretsecretsecret")
    for file in [one for one in place.rglob("*") if one.is_file()]:
        name = str(file.relative_to(place))
        if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
            (to := Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
    return str(local_dir)


ANSWERS = {one.__name__: one for one in (create_repo, upload_folder, snapshot_download)}
