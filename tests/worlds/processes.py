"""Finding the workers of a build among the processes of this machine."""

from pathlib import Path


def encoders(root: int) -> list[int]:
    """The ids of the encode workers among a process' descendants."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _is_encoder(folder) and _descends(int(folder.name), root):
            found.append(int(folder.name))
    return found


def _is_encoder(process: Path) -> bool:
    try:
        return b"EncodeWorker" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def _descends(pid: int, root: int) -> bool:
    while pid > 1:
        if pid == root:
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])
    return False
