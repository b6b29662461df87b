"""What is known of HCMM's published numbers: top-1 accuracy in percent, as a third party lists them.

The paper's tables could not be had, and its repository has no results.
"""

LISTED = {
    "CIFAR-100, 10 tasks": {"HCMM": 77.72, "MagMax": 77.04},
    "CIFAR-100, 20 tasks": {"HCMM": 75.95},
    "Cars, 10 tasks": {"HCMM": 69.7, "MagMax": 65.62},
    "ImageNet-R, 20 tasks": {"HCMM": 82.0},
}
