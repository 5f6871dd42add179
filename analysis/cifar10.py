"""CIFAR-10: a network of three convolutions (151 k parameters) on 20,000 images at small scale,
ResNet-18 with random crops and flips at full.

    python -m analysis.cifar10 [--scale small|full] [--data FOLDER] [--jobs 2] [--check] …

Final loss and accuracy: on the probe of 1,000 test images at small scale, on all 10,000 at full.
Full scale was never run.
"""

from analysis.study import Scale, Study, main

FULL = {
    "network": "resnet18",
    "batch_size": 256,
    "augment": True,
    "validation": 5000,
    "whole_test": True,
}
STUDY = Study(
    "cifar10",
    {
        "small": Scale({"": {"limit": 20_000}}, 250, aligned=16),
        "full": Scale({"": FULL}, 60 * 45_000 // 256, every=100, decay=True),
        "tiny": Scale(
            {"": {"batch_size": 16, "width": 4, "limit": 64, "probe": 32, "validation": 16}},
            10,
            every=2,
            aligned=8,
        ),
    },
)

if __name__ == "__main__":
    main(STUDY, __doc__)
