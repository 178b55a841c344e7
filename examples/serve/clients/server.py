"""Starts the server and stops it again. For the other programs here."""

import contextlib
import re
import signal
import subprocess
import threading


@contextlib.contextmanager
def server(program, *arguments):
    """The process, and its address. It must end by itself when it is asked to."""
    command = [program, "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"listens on (http://\S+)", line):
                break
        else:
            raise SystemExit("the server did not start:\n" + "".join(lines))
        # It must not wait for somebody who reads its messages.
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        yield process, found[1]
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        assert code == 0, f"the server ended with {code}"
    finally:
        process.kill()
        process.wait()
