"""hub.py — files of a dataset, on the Hugging Face hub or on this disk.

huggingface_hub downloads and verifies them. It honours HF_ENDPOINT (a mirror), HF_TOKEN,
HF_HUB_OFFLINE, and the variables of proxies.
"""
from support.runs import UserError, first_line_of


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
    """(the commit of a dataset's main branch, [[name, bytes]] of its files in `folder`, sorted).
    Raises UserError if the hub cannot be reached or refuses."""
    hub = import_hub()
    try:
        api = hub.HfApi()
        commit = api.dataset_info(repo).sha
        tree = api.list_repo_tree(repo, folder, recursive=True, revision=commit,
                                  repo_type="dataset")
        files = [[entry.path, entry.size] for entry in tree
                 if isinstance(entry, hub.hf_api.RepoFile)]
    except Exception as error:  # of the network, of HTTP, of the answer: many classes
        raise explained(error, repo) from None
    return commit, sorted(files)


def fetch(repo, commit, name, folder):
    """Download a file into `folder`, where no other is yet, and verify it; returns its path. Raises
    UserError if it cannot be had, or is not what the hub lists: it is deleted then."""
    hub = import_hub()
    try:
        path = hub.hf_hub_download(repo, name, repo_type="dataset", revision=commit,
                                   local_dir=folder)
        found = hub.HfApi().verify_repo_checksums(repo, repo_type="dataset", revision=commit,
                                                  local_dir=folder)
    except Exception as error:  # as above
        raise explained(error, f"{repo}/{name}") from None
    path = folder / path
    if found.mismatches:
        path.unlink()
        raise UserError(f"{name}: the download is not the file that {repo} lists (its hash "
                        f"differs), so it was deleted — run the same command again")
    return path


def explained(error, what):
    """The UserError for a failed download."""
    endpoint = import_hub().constants.ENDPOINT
    return UserError(f"{what} cannot be downloaded from {endpoint} ({type(error).__name__}: "
                     f"{first_line_of(error)}) — check the network, HF_ENDPOINT and HF_TOKEN, and "
                     f"run the same command again")


class Downloads:
    """Files of a dataset, each fetched when it is wanted. `rows`: what a process that goes on must
    know of them, [[name, bytes]]."""

    def __init__(self, repo, commit, rows, folder):
        self.repo = repo
        self.commit = commit
        self.rows = rows
        self.folder = folder
        self.names = [row[0] for row in rows]

    def get(self, i):
        """The path of file i. Raises UserError."""
        return fetch(self.repo, self.commit, self.names[i], self.folder)

    def done_before(self, i):
        """Delete the files before file i."""
        for name in self.names[:i]:
            (self.folder / name).unlink(missing_ok=True)


class LocalFiles:
    """Files on this disk, with the same methods."""

    def __init__(self, paths):
        self.paths = paths
        self.names = [str(path) for path in paths]
        # What tells that a file is still the same: name, bytes, time of its last change.
        self.rows = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]

    def get(self, i):
        return self.paths[i]

    def done_before(self, i):
        pass
