# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The plain baseline: the procedure of MAPSeg (arXiv 2303.09373), written out straightforwardly with public libraries.

What it is: our own reading of the paper's sections 3 and 4, as one would write it first. A sample is made from the file
each time: decode, clip the whole volume at a percentile, warp the whole volume and its label with TorchIO, find the
foreground's box, cut the patch, resize the box. Masks are drawn by patchify and argsort. Every image (local or
global, clean or masked) is a separate call, in float32. All terms are added and go backward once. Inference walks
over windows in three nested loops, encodes the same global view again for each, and adds up logits of the whole volume.

What it is not: the authors' code, of which nothing was copied, nor a slowed-down version of the package: where the
text leaves a choice, the cheaper one is taken (each image of a pass is encoded once; PyTorch's kernels and AdamW).

It receives the package's network modules, so that results can be compared, with PyTorch's transposed convolution in
them, and uses nothing else of the package.
"""
