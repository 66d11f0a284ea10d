"""Programs of their own, without the seconds that the imports of each take.

`python -m tests.programs` imports what they need, and forks itself for each program that it is
asked for, by a line of JSON: the child runs the code as its main module, and ends as any other.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import warnings

# Seconds that a test waits at most, for what it asks of a program that it started: with both cores
# busy, what takes 3 s alone took 50.
DEADLINE = 600

# None of these starts a thread.
_IMPORTS = (
    "bthooks",
    "tensorboardX",
    "tensorboard.compat.proto.event_pb2",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
)


class Programs:
    """The process that forks, started at the first program."""

    def __init__(self):
        self._server = None

    def run(self, code, *arguments, folder, count=1):
        """Run `code` in `count` processes; each is given its number behind the `arguments`.

        Returns:
            for each, its exit status, and what it said.
        """
        if self._server is None:
            command = [sys.executable, "-m", "tests.programs"]
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        asked = {"code": code, "arguments": [*map(str, arguments)], "folder": str(folder)}
        self._server.stdin.write(json.dumps(asked | {"count": count}) + "\n")
        self._server.stdin.flush()
        statuses = json.loads(self._server.stdout.readline())
        said = [(folder / f"said {number}").read_text(errors="replace") for number in range(count)]
        return [*zip(statuses, said, strict=True)]

    def end(self):
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(DEADLINE)


def wait(children):
    """Their exit statuses; what takes too long is killed."""
    until, statuses = time.monotonic() + DEADLINE, {}
    while len(statuses) < len(children):
        for child in children:
            found, status = (0, 0) if child in statuses else os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
            elif child not in statuses and time.monotonic() > until:
                os.kill(child, 9)
        time.sleep(0.005)
    return [statuses[child] for child in children]


def serve():
    """Fork for each program that is asked for; returns in the children, with the code to run."""
    for name in _IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        asked, children = json.loads(line), []
        for number in range(asked["count"]):
            if (child := os.fork()) == 0:
                said = os.open(f"{asked['folder']}/said {number}", os.O_CREAT | os.O_WRONLY)
                for stream in (1, 2):
                    os.dup2(said, stream)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                sys.argv = ["-c", *asked["arguments"], str(number)]
                return asked["code"]
            children.append(child)
        print(json.dumps(wait(children)), flush=True)
    return ""


if __name__ == "__main__":
    code = serve()
    warnings.simplefilter("error", RuntimeWarning)
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
