"""Log-likelihoods without any server: token ids on standard input, sums on standard output.

Run by the project's own Python (see test_lm_eval.py): `in_process.py MODE`. The input is a JSON
list of [context ids, continuation ids]; the output one of [log-likelihood, is it the greedy one].
"""

import json
import sys

import torch

from model_store import resolve_model
from runtime.model import Model


def main() -> None:
    model = Model.from_folder(resolve_model("default"), dtype=torch.bfloat16)
    scores = []
    for context, continuation in json.load(sys.stdin):
        logits_SV = model.forward([*context, *continuation][:-1], mode=sys.argv[1])
        logprobs_AV = logits_SV[len(context) - 1 :].float().log_softmax(-1)
        ids_A = torch.tensor(continuation)
        chosen_A = logprobs_AV.gather(1, ids_A[:, None])[:, 0]
        is_greedy = bool((logprobs_AV.argmax(-1) == ids_A).all())
        scores.append([float(chosen_A.double().sum()), is_greedy])
    json.dump(scores, sys.stdout)


if __name__ == "__main__":
    main()
