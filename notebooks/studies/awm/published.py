"""Numbers of the paper, as far as they can be had: its tables per data set could not be.

The forgetting figure's are those of the first author's plotting script, in percent after every stage: ImageNet, then
Cars, Sketches, WikiArt and an unnamed fourth task, by LwF on MobileNetV3. AWM's lines there are constant, and three of
them equal LwF's first values to two decimals, so they may not be measurements of their own.
"""

STAGES = ("ImageNet", "Cars", "Sketches", "WikiArt", "fourth")
LWF = {
    "ImageNet": (74.78, 71.21, 53.98, 47.67, 31.17),
    "Cars": (78.5, 44.24, 19.69, 7.7),
    "Sketches": (75.32, 66.025, 34.47),
    "WikiArt": (67.8, 41.02),
}
"""By task, from the stage on in which it is learned."""
AWM = {"ImageNet": 71.8, "Cars": 78.5, "Sketches": 75.32, "WikiArt": 67.8}
OVER_MASKING = 2.6
"""Points of average accuracy by which AWM is said to be above masking."""
PARAMETERS = {
    (1, 1): 2_189_760, (2, 2): 547_368, (2, 4): 273_720, (4, 2): 273_684, (3, 3): 241_490, (4, 4): 136_860,
    (5, 5): 86_605, (4, 8): 68_421, (8, 4): 68_421, (6, 6): 59_602, (7, 7): 42_967, (8, 8): 34_188, (9, 9): 25_806,
}  # fmt: skip
"""Modulation parameters a task of MobileNetV2 by factors, of 2,189,760 convolution weights."""
