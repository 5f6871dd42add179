"""A character transformer: 3 layers of width 64 on the source of Python's standard library at small
scale; on tiny Shakespeare, 6 layers of width 384 and a context of 256 at full.

    python -m analysis.transformer [--scale small|full] [--text FILE] [--jobs 2] [--check] …

Losses are nats a character. Full scale was never run.
"""

from analysis.study import Scale, Study, main

SMALL = {"layers": 3, "width": 64, "batch_size": 16, "probe": 32}
FULL = {
    **{"layers": 6, "width": 384, "heads": 6, "context": 256, "dropout": 0.2},
    **{"batch_size": 64, "probe": 128, "text": "shakespeare"},
}
STUDY = Study(
    "transformer",
    {
        "small": Scale({"": SMALL}, 600, aligned=16),
        "full": Scale({"": FULL}, 5000, every=100, decay=True),
        "tiny": Scale(
            {"": {"layers": 1, "width": 16, "context": 16, "batch_size": 8, "probe": 4}},
            20,
            every=5,
            aligned=4,
        ),
    },
)

if __name__ == "__main__":
    main(STUDY, __doc__, ("--data", "--text"))
