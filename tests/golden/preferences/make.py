"""What TRL's losses make of a few log-probs and scores. Needs trl and torch; made with trl 1.16.0.

    python tests/golden/preferences/make.py        # writes trl.npz beside this file

TRL computes its losses inside trainers. They get a stand-in for themselves, and for a model one that says the log-probs
and scores of the file. Each loss is of one pair (or text) at a time, hence not a mean.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

HERE = Path(__file__).parent
BETA, SMOOTHING, GAMMA, CENTRE = 0.3, 0.15, 0.8, 0.05
METHODS = {'dpo': 'sigmoid', 'robust_dpo': 'robust', 'hinge': 'hinge', 'ipo': 'ipo'}


def draw():
    """Log-probs of tokens of six pairs [6, 2, 5], the last of some padding. One pair is equal, one far off."""
    random = np.random.default_rng(0)
    policy, reference = -random.exponential(1.0, (2, 6, 2, 5))
    sizes = np.array([[5, 5], [3, 5], [1, 4], [2, 1], [4, 4], [5, 3]])
    policy[4, 1], reference[4, 1] = policy[4, 0], reference[4, 0]
    policy[5, 0], policy[5, 1] = policy[5, 0] * 30, policy[5, 1] * 0.01
    mask = np.arange(5) < sizes[..., None]
    return policy * mask, reference * mask, mask


def trainer(**fields):
    """What the losses read of a trainer."""
    gather = SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x, device='cpu')
    fields = {'_total_train_tokens': 0, 'aux_loss_enabled': False, 'use_weighting': False, 'ld_alpha': None, **fields}
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=gather,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **fields,
    )


def model(log_probs):
    """Says these log-probs [B, T - 1]."""
    zeros = torch.zeros_like(log_probs)
    told = {'entropy': zeros, 'mean_logits': zeros, 'is_top1': zeros > 0}
    return lambda **_: SimpleNamespace(log_probs=log_probs, **told)


def batch(mask):
    """Inputs of one prompt token and the masked response."""
    completion = torch.as_tensor(np.concatenate([np.zeros((len(mask), 1)), mask], axis=1)).long()
    return {'input_ids': torch.zeros_like(completion), 'attention_mask': completion, 'completion_mask': completion}


def dpo(kind, policy, reference, mask):
    own = trainer(
        beta=BETA,
        label_smoothing=SMOOTHING,
        loss_types=[kind],
        loss_weights=[1.0],
        f_divergence_type='reverse_kl',
        precompute_ref_logps=True,
    )
    sums = torch.as_tensor(reference.sum(-1))
    inputs = batch(mask) | {'ref_chosen_logps': sums[:1], 'ref_rejected_logps': sums[1:]}
    return DPOTrainer._compute_loss(own, model(torch.as_tensor(policy)), inputs, False)


def kto(policy, reference, mask, label, divergence):
    own = trainer(
        beta=BETA,
        loss_type='kto',
        desirable_weight=1.2,
        undesirable_weight=0.7,
        calculate_KL=True,
        precompute_ref_logps=True,
        _compute_kl_logps=lambda *_: torch.tensor([divergence]),
    )
    sums = torch.as_tensor(reference.sum(-1, keepdims=True))
    inputs = batch(mask[None]) | {'label': torch.tensor([label]), 'ref_logps': sums, 'ref_KL_logps': torch.zeros(1)}
    return KTOTrainer._compute_loss(own, model(torch.as_tensor(policy[None])), inputs, False)


def reward(scores, margin):
    own = trainer(args=SimpleNamespace(center_rewards_coefficient=CENTRE))
    said = SimpleNamespace(logits=torch.as_tensor(scores)[:, None])
    return RewardTrainer.compute_loss(own, lambda **_: said, {'margin': torch.tensor([margin])})


def unreferenced(policy, mask):
    sums = torch.as_tensor(policy.sum(-1))
    means = sums / torch.as_tensor(mask.sum(-1))
    own = trainer(beta=BETA, alpha=0.0, label_smoothing=0.0, simpo_gamma=GAMMA, loss_type='sigmoid')
    found = {'cpo': CPOTrainer.cpo_loss(own, sums[:, 0], sums[:, 1])[0]}
    own.loss_type = 'simpo'
    found['simpo'] = CPOTrainer.cpo_loss(own, means[:, 0], means[:, 1])[0]
    # What is subtracted from -log p of the chosen response; TRL computes it in float32.
    found['orpo'] = ORPOTrainer.odds_ratio_loss(own, means[:, 0], means[:, 1])[0]
    return found


def main():
    policy, reference, mask = draw()
    count = range(len(policy))
    found = {
        name: torch.stack([dpo(kind, policy[i], reference[i], mask[i]) for i in count])
        for name, kind in METHODS.items()
    }
    found |= unreferenced(policy, mask)
    labels, divergence = [True, False, True, False, True, False], [0.0, 0.7, -0.5, 1.5, 0.2, 0.1]
    chosen = [kto(policy[i, 0], reference[i, 0], mask[i, 0], labels[i], divergence[i]) for i in count]
    found['kto'] = torch.stack(chosen)
    scores, margins = policy[..., 0], [0.0, 1.0, 0.5, 0.0, 2.0, 0.0]
    found['reward'] = torch.stack([reward(scores[i], margins[i]) for i in count])
    inputs = {'policy': policy, 'reference': reference, 'mask': mask, 'labels': np.where(labels, 1, -1)}
    inputs |= {'divergence': np.array(divergence), 'margins': np.array(margins)}
    np.savez(HERE / 'trl.npz', **inputs, **{f'loss_{name}': x.numpy() for name, x in found.items()})


if __name__ == '__main__':
    main()
