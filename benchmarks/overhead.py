"""What looking costs: the plain pipeline against the lens with no ops, with reads, and with edits.

    python benchmarks/overhead.py [--device cuda] [--steps 8] [--repeat 5]

Prints seconds per denoising step (the least of several runs, taken in turn) and the ratio to the plain pipeline.
"""

import argparse
import time

import torch

import dit_lens as dl
from dit_lens.toys.train import hardware

PROMPT = "a big red circle left on a checkered blue background"
CASES = {
    "no ops": [],
    "read |mean| of every block": [dl.Read("blocks.*.img", reduce="|mean|")],
    "read every token of every block": [dl.Read("blocks.*.img")],
    "zero 8 channels of every block": [dl.Zero("blocks.*.img", channels=range(8))],
}


def seconds(run):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()

    lens = dl.DiTLens.toy().to(options.device)
    plain = dl.DiTLens.toy().to(options.device).pipe  # a pipeline of its own
    call = {**lens.defaults, "num_inference_steps": options.steps}
    runs = {"plain pipeline": lambda: plain(PROMPT, generator=torch.Generator().manual_seed(0), **call)}
    for name, ops in CASES.items():
        runs[name] = lambda ops=ops: lens.run(PROMPT, ops, seed=0, num_inference_steps=options.steps)
    with lens.quiet():
        plain.set_progress_bar_config(disable=True)
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(options.repeat + 1):  # the first round warms up
            for name, run in runs.items():
                best[name] = min(best[name], seconds(run) / options.steps)
    print(f"{hardware(options.device)}, torch {torch.__version__}, {options.steps} steps, best of {options.repeat}")
    for name, least in best.items():
        print(f"{name:<34}{least * 1000:>9.2f} ms/step{least / best['plain pipeline']:>8.3f}")


if __name__ == "__main__":
    main()
