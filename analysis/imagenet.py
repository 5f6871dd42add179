"""ImageNet-style images at 64×64 pixels and ResNet-18: Tiny-ImageNet's 50 classes by default, any
ImageNet folder or Parquet files with --data.

    python -m analysis.imagenet [--scale small|full] [--data FOLDER] [--jobs 2] [--check] …

Small scale: a width of 8 instead of 64, the stem for large images, and the first 10 classes; full:
all of it. The final loss and accuracy are on all held-out images. Full scale was never run.
"""

from analysis.study import Scale, Study, main

SMALL = {
    "batch_size": 32,
    "width": 8,
    "stem": "imagenet",
    "classes": 10,
    "probe": 250,
    "validation": 250,
}
FULL = {"batch_size": 256, "validation": 2500}
STUDY = Study(
    "imagenet",
    {
        "small": Scale({"": SMALL}, 150, aligned=16),
        "full": Scale({"": FULL}, 6000, every=100, decay=True),
        "tiny": Scale(
            {"": SMALL | {"batch_size": 8, "width": 4, "size": 32, "probe": 8, "validation": 8}},
            6,
            every=2,
            aligned=4,
        ),
    },
)

if __name__ == "__main__":
    main(STUDY, __doc__)
