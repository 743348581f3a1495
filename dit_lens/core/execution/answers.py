"""What a server answers when a job fails there, in the words of whoever sent it."""

from __future__ import annotations

import re

# What a server says -> what can be done about it. Its own sentences, and names of errors, in lower case.
_ADVICE = {
    ("modulenotfounderror",): (
        "What a function imports has to be there, or to be named here first: nnsight.register('my_module')."
    ),
    ("could not deploy", "error provisioning", "error starting model", "not dedicated", "cannot be accom"): (
        "The server does not serve this model. Whoever runs it has to deploy it under the name it is asked for: {key}."
    ),
    ("evicted", "preempted", "critical server error", "error submitting request", "error initializing", "actor died"): (
        "The model is being restarted or was taken away there. Run it again in a minute."
    ),
    ("execution timeout", "longer than timeout"): (
        "Make the run smaller: fewer prompts at once (batch_size=), or fewer steps."
    ),
    ("endpointconnectionerror", "could not connect to the endpoint", "nosuchbucket", "botocore", "object store"): (
        "Large results go through the server's object store, which it cannot reach. Keep less: reduce reads where they "
        "are (reduce=), or run fewer prompts at once (batch_size=)."
    ),
}


def find_advice(gist: str, key: str) -> str:
    """What can be done about a failure; empty where that is not known.

    gist: of the answer.
    key: under which the server knows the model.
    """
    said = gist.lower()
    advice = next((text for words, text in _ADVICE.items() if any(word in said for word in words)), "")
    return advice.replace("{key}", key)


def shorten_answer(answer: str) -> str:
    r"""What a server says before a traceback, or what the traceback is of; the error's cause shows all of it.

    >>> shorten_answer("Could not deploy this model.\nTraceback (most recent call last):\n  File ...")
    'Could not deploy this model'
    >>> shorten_answer("Traceback (most recent call last):\n  File ...\nValueError: no such thing")
    'ValueError: no such thing'
    >>> shorten_answer("Traceback (most recent call last):\n  File ...\nValueError: no such thing\na note")
    'ValueError: no such thing'
    """
    lines = answer.strip().splitlines() or [""]
    frames = [i for i, line in enumerate(lines) if line.startswith(" ")] if lines[0].startswith("Traceback") else [-1]
    return lines[min(frames[-1] + 1 if frames else 1, len(lines) - 1)].removesuffix(".")


def find_origin(answer: str) -> str:
    r"""Which function of ``Apply`` failed, where, and in which line of its own; empty where none did.

    >>> frames = '  File "/there/request/ops.py", line 9, in apply\n  File "[f:1] /here/mine.py", line 3, in f\n'
    >>> find_origin(f"Traceback ...\n{frames}ValueError: no\nraised by f, applied at blocks.0.img, step 1: ops[0]")
    ' It was raised by f, applied at blocks.0.img, step 1: ops[0], in line 3 of /here/mine.py.'
    """
    said = re.findall(r"^(raised by .*: ops\[\d+\])$", answer, re.MULTILINE)
    if not said:
        return ""
    frames = re.findall(r'^ *File "(?:\[[^\]]*\] )?(.+)", line (\d+), in (.+)$', answer, re.MULTILINE)
    called = [i for i, (file, _, name) in enumerate(frames) if name == "apply" and re.search(r"[\\/]ops\.py$", file)]
    own = frames[called[-1] + 1 :][:1] if called else []
    return f" It was {said[-1]}{''.join(f', in line {line} of {file}' for file, line, _ in own)}."
