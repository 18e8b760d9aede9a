# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The whole of MAPSeg in one file of plain PyTorch: the best first reading (Zhang et al., CVPR 2024, arXiv 2303.09373).

    python examples/mapseg_plain.py        # toy images, half a minute on a CPU

It pretrains an encoder, adapts a segmenter from a labelled source to an unlabelled target, and segments a whole image.
Sizes are far from the paper's (width 512, depth 8, patches of 96). The package has the same method for real scans; its
trainers are tested to be equal to this file (tests/unit/test_plain_example.py).

An image is (B, 1, X, Y, Z) in [0, 1], a label (B, X, Y, Z); a box (B, 3, 2) has the edges of the local patch along each
axis, in voxels of the global view; a mask is True where hidden.
"""

import copy
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = torch.tensor([0.5, 0.05, 0.025])  # beta, gamma, delta: of local, global and cosine terms (section 4.1)
TARGET_WEIGHTS = torch.tensor([1.0, 0.1, 0.05])  # 1, 2 gamma, 2 delta
MASK_RATIO = 0.7  # share of hidden blocks


def norm(channels, groups=8):
    return nn.GroupNorm(math.gcd(channels, groups), channels)


def conv_norm_relu(inputs, outputs, kernel, dilation=1, groups=8):
    conv = nn.Conv3d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    return nn.Sequential(conv, norm(outputs, groups), nn.ReLU())


class Block(nn.Module):
    """A conv here is GroupNorm, convolution, ReLU; the third has no ReLU before the sum."""

    def __init__(self, inputs, outputs, stride=None):
        super().__init__()
        kernel = {"kernel_size": 3, "padding": 1} if stride is None else {"kernel_size": stride, "stride": stride}
        self.norm1, self.conv1 = norm(inputs, 32), nn.Conv3d(inputs, outputs, bias=False, **kernel)
        self.norm2, self.conv2 = norm(outputs, 32), nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.norm3, self.conv3 = norm(outputs, 32), nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)

    def forward(self, x):
        skip = F.relu(self.conv1(self.norm1(x)))
        x = F.relu(self.conv2(self.norm2(skip)))
        return F.relu(self.conv3(self.norm3(x)) + skip)


def make_encoder(width, depth, stride):
    """g: the first block reduces the grid by the stride, the others keep it."""
    blocks = nn.Sequential(Block(1, width, stride), *(Block(width, width) for _ in range(depth - 1)))
    return nn.Sequential(OrderedDict(blocks=blocks))


def make_autoencoder(width=16, depth=2, stride=(2, 2, 2), channels=(32, 16)):
    """Encoder and reconstruction decoder, for local patches and global views alike (section 3.2)."""
    upsample, conv = nn.ConvTranspose3d(width, channels[0], stride, stride), nn.Conv3d(channels[1], 1, 3, padding=1)
    parts = OrderedDict(upsample=upsample, block=Block(*channels), norm=norm(channels[1]), conv=conv, last=nn.Sigmoid())
    return nn.Sequential(OrderedDict(encoder=make_encoder(width, depth, stride), decoder=nn.Sequential(parts)))


class ASPP(nn.Module):
    """Dilated branches and a pooled one side by side (DeepLabV3), then a projection with dropout."""

    def __init__(self, inputs, width, dilations, dropout):
        super().__init__()
        dilated = [conv_norm_relu(inputs, width, 3, dilation) for dilation in dilations]
        self.branches = nn.ModuleList([conv_norm_relu(inputs, width, 1), *dilated])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool3d(1), conv_norm_relu(inputs, width, 1, 1, min(8, width // 2)))
        self.project = nn.Sequential(conv_norm_relu((len(dilations) + 2) * width, width, 1), nn.Dropout(dropout))

    def forward(self, x):
        pooled = self.pool(x).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


class Segmenter(nn.Module):
    """f = h . g, where the decoder h sees local and global features side by side (section 3.4)."""

    def __init__(self, classes, width=16, depth=2, stride=(2, 2, 2), dilations=(1, 2), head=16, dropout=0.1):
        super().__init__()
        self.encoder = make_encoder(width, depth, stride)
        self.aspp = ASPP(2 * width, width, dilations, dropout)
        up, logits = nn.ConvTranspose3d(width, head, stride, stride), nn.Conv3d(head, classes, 1)
        layers = nn.Sequential(up, norm(head), nn.ReLU(), conv_norm_relu(head, head, 3), logits)
        self.head = nn.Sequential(OrderedDict(layers=layers))  # names as in the package: weights can be exchanged

    def decode(self, features, context):
        return self.head(self.aspp(torch.cat([features, context], dim=1)))

    def forward(self, local, view, box):
        """Local logits, global logits, local features, and the part of the global features under the patch."""
        local_features, global_features = self.encoder(local), self.encoder(view)
        context = crop_features(global_features, box, view.shape[2:], local_features.shape[2:])
        local_logits = self.decode(local_features, context)
        return local_logits, self.decode(global_features, global_features), local_features, context


def crop_features(features, box, view_size, size):
    """The part of the global features under the box, on the grid of the local features."""
    grids = []
    for edges in box / torch.tensor(view_size).to(box)[:, None]:  # shares of the global view
        axes = [2 * (a + (torch.arange(n) + 0.5) / n * (b - a)) - 1 for (a, b), n in zip(edges, size)]
        grids.append(torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1))
    return F.grid_sample(features, torch.stack(grids).to(features), padding_mode="border", align_corners=False)


def draw_mask(image, block):
    """A mask of its own for each image of the batch: the same number of blocks, at other places."""
    grid = [side // b for side, b in zip(image.shape[2:], block)]
    order = torch.rand(len(image), math.prod(grid)).argsort(dim=1)
    mask = (order < round(MASK_RATIO * math.prod(grid))).view(-1, 1, *grid)
    return F.interpolate(mask.float(), image.shape[2:], mode="nearest").bool()


def segmentation_loss(logits, label):
    """Eq. 1: mean cross-entropy minus mean soft Dice of the foreground classes that the labels hold."""
    probability = logits.softmax(dim=1)
    truth = F.one_hot(label, logits.shape[1]).movedim(-1, 1).float()
    both, sizes = (x.sum(dim=(0, 2, 3, 4))[1:] for x in (probability * truth, probability + truth))
    dice = (2 * both + 1e-5) / (sizes + 1e-5)
    present = truth.sum(dim=(0, 2, 3, 4))[1:] > 0
    return F.cross_entropy(logits, label) - (dice[present].mean() if present.any() else 0)


def reconstruction_loss(network, batch, masks):
    """Mean squared error of the hidden voxels, local patch plus global view (section 3.2)."""
    pairs = zip((batch["local"], batch["view"]), masks)
    return sum((network(image.masked_fill(mask, 0)) - image)[mask].square().mean() for image, mask in pairs)


def terms(network, batch, labels, masks=None):
    """Local, global and cosine term of one pass, clean or with hidden blocks."""
    images = [batch["local"], batch["view"]]
    if masks is not None:
        images = [image.masked_fill(mask, 0) for image, mask in zip(images, masks)]
    local_logits, global_logits, local_features, context = network(*images, batch["box"])
    local_loss, global_loss = segmentation_loss(local_logits, labels[0]), segmentation_loss(global_logits, labels[1])
    cosine = F.cosine_similarity(local_features.flatten(2), context.flatten(2), dim=2)  # Eq. 4
    return torch.stack([local_loss, global_loss, 1 - cosine.mean()])


def source_loss(network, source, masks):
    """Source side of Eq. 8: a clean and a masked pass."""
    labels = source["label"], source["global_label"]
    return (WEIGHTS * (terms(network, source, labels) + terms(network, source, labels, masks))).sum()


def target_loss(network, teacher, target, masks):
    """Target side of Eq. 8: a masked pass, compared with what the teacher says of the clean images (section 3.3)."""
    with torch.no_grad():
        local_logits, global_logits, _, _ = teacher(target["local"], target["view"], target["box"])
    labels = local_logits.argmax(dim=1), global_logits.argmax(dim=1)
    return (TARGET_WEIGHTS * terms(network, target, labels, masks)).sum()


@torch.no_grad()
def follow(teacher, student, decay):
    """Eq. 3: theta <- decay theta + (1 - decay) phi."""
    for theta, phi in zip(teacher.parameters(), student.parameters()):
        theta.mul_(decay).add_((1 - decay) * phi)


def toy_scan(contrast, side=20):
    """An image and its label: a cube in a cube. The target shows the same things in another contrast."""
    label = torch.zeros((side,) * 3, dtype=torch.long)
    for value, size in ((1, 12), (2, 6)):
        label[tuple(slice(first, first + size) for first in torch.randint((side - size) // 2, (3,)).tolist())] = value
    image = torch.tensor(contrast)[label] + 0.03 * torch.randn(label.shape)
    return image.clamp(0.01, 1)[None, None], label[None]


def draw_pair(image, label, patch):
    """A random patch, the whole image resized to as many voxels, and where the patch lies in it."""
    sides = torch.tensor(image.shape[2:])
    start = torch.stack([torch.randint(side - patch + 1, ()) for side in sides.tolist()])
    inside = (..., *(slice(first, first + patch) for first in start.tolist()))
    return {
        "local": image[inside],
        "view": F.interpolate(image, (patch,) * 3, mode="trilinear"),
        "box": (torch.stack([start, start + patch], dim=1) * (patch / sides)[:, None])[None],
        "label": label[inside],
        "global_label": F.interpolate(label[None].float(), (patch,) * 3, mode="nearest-exact")[0].long(),
    }


@torch.no_grad()
def segment(network, image, patch, stride):
    """Logits of a whole image: the mean of windows that each see their part of the same global view."""
    network.eval()
    sides = torch.tensor(image.shape[2:])
    view = network.encoder(F.interpolate(image, (patch,) * 3, mode="trilinear"))
    total, count = torch.zeros(()), torch.zeros(image.shape[2:])
    starts = [torch.tensor([*range(0, side - patch, stride), side - patch]) for side in sides.tolist()]
    for start in torch.cartesian_prod(*starts):
        inside = tuple(slice(first, first + patch) for first in start.tolist())
        box = torch.stack([start, start + patch], dim=1) * (patch / sides)[:, None]
        features = network.encoder(image[(..., *inside)])
        logits = network.decode(features, crop_features(view, box[None], (patch,) * 3, features.shape[2:]))
        total = total if total.dim() else logits.new_zeros(1, logits.shape[1], *sides.tolist())
        total[(..., *inside)] += logits
        count[inside] += 1
    return total / count


def train(name, network, steps, loss_of, after_step=lambda: None):
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        after_step()
    print(f"{name}: loss {loss.item():.3f} after {steps} steps")


def main(steps=(20, 150, 100), patch=12, blocks=((4, 4, 4), (2, 2, 2)), decay=0.95):
    """Returns the Dice of a target image, source-only and adapted: toy images show that it runs, not that it gains."""
    torch.manual_seed(0)
    source, target = ([toy_scan(contrast) for _ in range(4)] for contrast in ((0.2, 0.5, 0.8), (0.4, 0.6, 0.7)))
    autoencoder, network = make_autoencoder(), Segmenter(classes=3)

    def draw(scans):
        pair = draw_pair(*scans[torch.randint(len(scans), ())], patch)
        return pair, [draw_mask(pair[key], block) for key, block in zip(("local", "view"), blocks)]

    def dice():
        image, label = target[0]
        found = segment(network, image, patch, patch // 2).argmax(dim=1)
        return (2 * ((found == label) & (label > 0)).sum() / ((found > 0).sum() + (label > 0).sum())).item()

    def adaptation_loss():
        return source_loss(network, *draw(source)) + target_loss(network, teacher, *draw(target))

    train("pretraining", autoencoder, steps[0], lambda: reconstruction_loss(autoencoder, *draw(source + target)))
    network.encoder.load_state_dict(autoencoder.encoder.state_dict())
    train("source-only (warm-up)", network, steps[1], lambda: source_loss(network, *draw(source)))
    before, teacher = dice(), copy.deepcopy(network).eval()
    train("adaptation", network, steps[2], adaptation_loss, lambda: follow(teacher, network, decay))
    return before, dice()


if __name__ == "__main__":
    print("Dice of a target image: {:.2f} source-only, {:.2f} adapted".format(*main()))
