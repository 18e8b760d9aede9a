# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A method of your own, without a change to the package: class shares of the target as in the source.

    python examples/new_method.py        # toy images, seconds on a CPU

A method says which passes an iteration makes and what each is compared with. This one learns from the source's labels,
and asks that over a batch of target images each class is predicted as often as the source's labels have it (Kullback-
Leibler divergence of class shares, after Bateson et al. 2022, arXiv 2108.03152). In a bundle it takes one overlay, here
``share_prior.yaml``, and this file on the PYTHONPATH::

    method:
      _target_: new_method.SharePrior
      loss: "@loss"
      shares: "$new_method.shares_of(@train#dataset#data, @labels)"
    "+imports": ["$import new_method"]

    python -m monai.bundle run training --config_file \
        "['configs/train.json', 'configs/dynunet.yaml', 'configs/dice_ce.yaml', 'share_prior.yaml']"
"""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import LoadImage
from monai.utils import set_determinism

from mapseg_components.engines import AdaptationTrainer
from mapseg_components.methods import Pass
from mapseg_components.networks import PlainPass


class SharePrior:
    """Supervised on the source; on the target, class shares near given ones."""

    selection = ("target_shares",)  # the target loss of the Score, by which weights are chosen without labels

    def __init__(self, loss, shares, weight=0.1):
        self.loss, self.shares = loss, torch.as_tensor(shares, dtype=torch.float32)
        self.weights = {"source": 1.0, "target_shares": weight}

    def passes(self, batch):
        found = []
        if "source" in batch:
            label = batch["source"]["label"]
            found.append(
                Pass({"image": batch["source"]["image"]}, lambda out: {"source": self.loss(out["logits"], label)})
            )
        if "target" in batch:
            found.append(Pass({"image": batch["target"]["image"]}, self.target_terms))
        return found

    def target_terms(self, outputs):
        predicted = outputs["logits"].softmax(1).mean(dim=(0, 2, 3, 4))
        shares = self.shares.to(predicted.device)
        return {"target_shares": (shares * (shares.clamp(min=1e-6) / predicted.clamp(min=1e-6)).log()).sum()}


def shares_of(cases, labels):
    """Share of the voxels that each class has in the cases' label maps; background first, then as in ``labels``."""
    maps = [LoadImage()(case["label"]) for case in cases]
    structures = [
        sum(float((one == value).sum()) for one in maps) / sum(one.numel() for one in maps) for value in labels.values()
    ]
    return [1 - sum(structures), *structures]


def toy(bright):
    """A ball in a box; in the target it is dark."""
    axis = torch.linspace(-1, 1, 16)
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    label = (distance < 0.5 + 0.2 * torch.rand(1)).float()[None, None]
    image = torch.where(label > 0, 0.8 if bright else 0.3, 0.3 if bright else 0.8) + 0.05 * torch.randn(label.shape)
    return {"image": image.clamp(0.01, 1), "label": label}


def main(steps=30):
    """Class shares of the target before and after, beside the source's."""
    set_determinism(0)
    network = PlainPass(UNet(3, 1, 2, channels=(8, 16), strides=(2,)))
    data = [{"source": toy(True), "target": {"image": toy(False)["image"]}} for _ in range(steps)]
    shares = torch.stack([one["source"]["label"].mean() for one in data]).mean()
    seen = data[0]["target"]["image"]
    before = network(seen)["logits"].softmax(1)[:, 1].mean()
    AdaptationTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), 0.01),
        method=SharePrior(DiceCELoss(to_onehot_y=True, softmax=True), [1 - shares, shares], weight=1.0),
    ).run()
    after = network.eval()(seen)["logits"].softmax(1)[:, 1].mean()
    print(f"share of the structure: {shares:.3f} in the source, {before:.3f} in a target image, {after:.3f} after")
    return float(shares), float(before), float(after)


if __name__ == "__main__":
    main()
