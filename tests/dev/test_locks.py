"""A lock keeps others out for as long as its holder lives, and not longer."""

import subprocess
import sys
import threading
import time
from pathlib import Path

from tributary_dev import places
from tributary_dev.locks import file_lock, is_held

HOLD = "import sys, time\nfrom pathlib import Path\nfrom tributary_dev.locks import file_lock\n"
HOLD += "with file_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    argv = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(argv, cwd=places.checkout() / "dev", stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_held(path)
        holder.kill()
    assert not is_held(path)


def test_a_holder_may_remove_the_file(tmp_path: Path) -> None:
    """Whoever waited for a file that is gone must not share the lock with whoever made a new one."""
    path = tmp_path / "lock"
    inside: list[str] = []
    seen: list[int] = []

    def enter(name: str) -> None:
        with file_lock(path):
            inside.append(name)
            time.sleep(0.002)
            seen.append(len(inside))
            inside.remove(name)
            path.unlink()

    threads = [threading.Thread(target=enter, args=(str(number),)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == [1] * len(threads)
