"""hub.py — files of a dataset, on the Hugging Face hub, where they are fetched and verified, or on
this disk.

It honours huggingface_hub's environment: HF_ENDPOINT (a mirror), HF_TOKEN, HF_HUB_OFFLINE, proxies.
"""
import hashlib
import os
import shutil
import threading
from dataclasses import dataclass

from support.runs import UserError, first_line_of


@dataclass
class HubFile:
    name: str  # its path in the repository
    size: int  # bytes
    # What its content must have: SHA-256 of a large file, else Git's SHA-1 of a "blob".
    sha256: str | None
    blob: str


def import_hub():
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("huggingface_hub is missing, which downloads — run: pip install -r "
                        "requirements-extras.txt, or give files on this disk with "
                        "--from") from None
    except ValueError as error:  # it reads the environment
        raise UserError(f"huggingface_hub cannot be imported ({first_line_of(error)}) — correct "
                        f"the variables HF_…") from None
    return huggingface_hub


def list_files(repo, folder=None):
    """(the commit of a dataset's main branch, its files in `folder`, by name). Raises UserError if
    the hub cannot be reached or refuses."""
    hub = import_hub()
    try:
        api = hub.HfApi()
        commit = api.dataset_info(repo).sha
        tree = api.list_repo_tree(repo, folder, recursive=True, revision=commit,
                                  repo_type="dataset")
        files = []
        for entry in tree:
            if isinstance(entry, hub.hf_api.RepoFile):
                sha256 = entry.lfs.sha256 if entry.lfs else None
                files.append(HubFile(entry.path, entry.size, sha256, entry.blob_id))
    except Exception as error:  # of the network, of HTTP, of the answer: many classes
        raise explained(error, repo) from None
    return commit, sorted(files, key=lambda file: file.name)


def fetch(repo, commit, file, folder):
    """Download a file into `folder`, or the rest of it if some is there, and verify it; returns its
    path. Raises UserError if it cannot be had, or is not what the hub lists: it is deleted then."""
    hub = import_hub()
    try:
        path = hub.hf_hub_download(repo, file.name, repo_type="dataset", revision=commit,
                                   local_dir=folder)
    except Exception as error:  # as above
        raise explained(error, f"{repo}/{file.name}") from None
    path = folder / path
    if not is_whole(path, file):
        path.unlink()
        raise UserError(f"{file.name}: the download is not the file that {repo} lists (its size or "
                        f"hash differs), so it was deleted — run the same command again")
    return path


def is_whole(path, file):
    if path.stat().st_size != file.size:
        return False
    with open(path, "rb") as content:
        if file.sha256 is not None:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
        header = f"blob {file.size}\0".encode()
        return hashlib.sha1(header + content.read()).hexdigest() == file.blob


def explained(error, what):
    """The UserError for a failed download."""
    endpoint = import_hub().constants.ENDPOINT
    return UserError(f"{what} cannot be downloaded from {endpoint} ({type(error).__name__}: "
                     f"{first_line_of(error)}) — check the network, HF_ENDPOINT and HF_TOKEN, and "
                     f"run the same command again")


class Downloads:
    """Files of a dataset, each fetched when it is wanted, or before (`expect`). `rows`: what a
    process that goes on must know of them."""

    def __init__(self, repo, commit, files, folder):
        self.repo = repo
        self.commit = commit
        self.files = files
        self.folder = folder
        self.names = [file.name for file in files]
        self.rows = [[file.name, file.size, file.sha256, file.blob] for file in files]
        self.results = {}  # number of a file: its path, or the error
        self.threads = {}

    def expect(self, i):
        """Begin to fetch file i in the background."""
        if i < len(self.files) and i not in self.threads:
            # A daemon, so that a Ctrl-C does not wait for 2 GB.
            self.threads[i] = threading.Thread(target=self.run, args=(i,), daemon=True)
            self.threads[i].start()

    def run(self, i):
        try:
            self.results[i] = fetch(self.repo, self.commit, self.files[i], self.folder)
        except BaseException as error:
            self.results[i] = error

    def get(self, i):
        """The path of file i. Raises UserError."""
        self.expect(i)
        self.threads[i].join()
        if isinstance(self.results[i], BaseException):
            raise self.results[i]
        return self.results[i]

    def take(self, i, target):
        """Put file i there."""
        os.replace(self.get(i), target)

    def done_before(self, i):
        """Delete the files before file i."""
        for earlier in range(i):
            path = self.folder / self.files[earlier].name
            path.unlink(missing_ok=True)


class LocalFiles:
    """Files on this disk, with the same methods."""

    def __init__(self, paths):
        self.paths = paths
        self.names = [str(path) for path in paths]
        # What tells that a file is still the same: name, bytes, time of its last change.
        stats = [path.stat() for path in paths]
        self.rows = [[name, stat.st_size, stat.st_mtime_ns]
                     for name, stat in zip(self.names, stats)]

    def expect(self, i):
        pass

    def get(self, i):
        return self.paths[i]

    def take(self, i, target):
        shutil.copyfile(self.paths[i], target)  # no link: the user's file may change

    def done_before(self, i):
        pass
