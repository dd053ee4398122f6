"""Draw architecture.svg and architecture-dark.svg, the figure of the README.

python docs/pictures/architecture.py

Needs nothing but Python. Each lane is one job: the driver on top, and below it the way of the rows.
"""

from html import escape
from pathlib import Path
from typing import Final

WIDTH: Final = 960
BOX_HEIGHT: Final = 118
DRIVER_HEIGHT: Final = 62

COLOURS: Final = {
    # By who runs there: fill, border. The text and the background of a scheme are below.
    "light": {
        "driver": ("#dbeafe", "#2563eb"),
        "task": ("#fef3c7", "#b45309"),
        "worker": ("#dcfce7", "#15803d"),
        "memory": ("#f3e8ff", "#7e22ce"),
        "files": ("#f3f4f6", "#6b7280"),
        "text": ("#111827", "#4b5563"),
        "tick": ("#15803d", "#ffffff"),
        "bolt": ("#dc2626", "#ffffff"),
    },
    "dark": {
        "driver": ("#172a4d", "#60a5fa"),
        "task": ("#3a2a0c", "#f59e0b"),
        "worker": ("#0f2f1c", "#4ade80"),
        "memory": ("#2d1a42", "#c084fc"),
        "files": ("#1f2630", "#9ca3af"),
        "text": ("#f3f4f6", "#b6bec9"),
        "tick": ("#4ade80", "#0d1117"),
        "bolt": ("#f87171", "#0d1117"),
    },
}


class Drawing:
    """An SVG that grows by one element a call; positions are in pixels, y goes down."""

    def __init__(self, scheme: str, height: int) -> None:
        self.colours = COLOURS[scheme]
        self.height = height
        self.elements: list[str] = []

    def add(self, element: str) -> None:
        self.elements.append(element)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 12,
        bold: bool = False,
        middle: bool = False,
    ) -> None:
        strong, soft = self.colours["text"]
        weight = "600" if bold else "400"
        anchor = "middle" if middle else "start"
        fill = strong if bold else soft
        self.add(
            f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" '
            f'text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'
        )

    def box(
        self,
        kind: str,
        x: float,
        y: float,
        width: float,
        height: float,
        *lines: str,
        copies: int = 1,
    ) -> None:
        """A box of several lines, the first one bold; with `copies` others stand behind it."""
        fill, border = self.colours[kind]
        for behind in reversed(range(copies)):
            shift = 5 * behind
            self.add(
                f'<rect x="{x + shift}" y="{y - shift}" width="{width}" height="{height}" rx="8" '
                f'fill="{fill}" stroke="{border}" stroke-width="1.5"/>'
            )
        title, *rest = lines
        self.text(x + 11, y + 22, title, size=13.5, bold=True)
        for index, line in enumerate(rest):
            self.text(x + 11, y + 42 + 17 * index, line, size=11.5)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> None:
        _, soft = self.colours["text"]
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        self.add(
            f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{soft}" stroke-width="1.6" fill="none" '
            f'marker-end="url(#head)"{dashes}/>'
        )

    def tick(self, x: float, y: float) -> None:
        """Rows are counted here."""
        fill, mark = self.colours["tick"]
        self.add(f'<circle cx="{x}" cy="{y}" r="9.5" fill="{fill}"/>')
        self.add(
            f'<path d="M{x - 4.5} {y + 0.5} l3.2 3.4 l6 -7" stroke="{mark}" stroke-width="2.1" '
            'fill="none" stroke-linecap="round" stroke-linejoin="round"/>'
        )

    def bolt(self, x: float, y: float) -> None:
        """Tests kill or break this."""
        fill, mark = self.colours["bolt"]
        self.add(f'<circle cx="{x}" cy="{y}" r="9.5" fill="{fill}"/>')
        self.add(f'<path d="M{x + 1.8} {y - 7} l-6 8 h4 l-1.6 6 l6 -8 h-4 z" fill="{mark}"/>')

    def svg(self) -> str:
        _, soft = self.colours["text"]
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{soft}"/></marker>'
        )
        fonts = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
                f'width="{WIDTH}" height="{self.height}" font-family="{fonts}" role="img" '
                'aria-label="Training: from files to a run folder. Scoring: from files to '
                'predictions.">',
                f"<defs>{head}</defs>",
                *self.elements,
                "</svg>\n",
            ]
        )


def draw_training(drawing: Drawing, top: float) -> None:
    drawing.text(16, top, "Training: jobs/train.py", size=16, bold=True)
    driver, rows = top + 14, top + 14 + DRIVER_HEIGHT + 34
    middle = rows + BOX_HEIGHT / 2
    drawing.box(
        "driver",
        *(16, driver, 928, DRIVER_HEIGHT),
        "driver, training/job.py",
        "checks the request, counts the rows in the footers, compares, calls TorchTrainer.fit(), "
        "publishes, then says `finished`",
    )
    drawing.box(
        "files", 16, rows, 130, BOX_HEIGHT, "files", "MNIST, or", "Parquet on a", "disk, S3, …"
    )
    drawing.box(
        *("task", 172, rows, 172, BOX_HEIGHT),
        "Ray Data",
        "read_parquet",
        "map_batches(decode)",
        "repartition",
        "materialize",
        copies=3,
    )
    drawing.box(
        *("memory", 382, rows, 150, BOX_HEIGHT),
        "object store",
        "blocks of three",
        "datasets: train,",
        "validation, test;",
        "spills to disk",
    )
    drawing.box(
        *("worker", 560, rows, 196, BOX_HEIGHT),
        "training workers",
        "iter_torch_batches",
        "the task's augment",
        "forward, backward, DDP",
        "evaluate, checkpoint",
        copies=3,
    )
    drawing.box(
        *("files", 796, rows, 148, BOX_HEIGHT),
        "run folder",
        "checkpoints/",
        "model/",
        "report.html",
        "manifest.json",
    )
    for start, end in ((146, 170), (356, 380), (532, 558), (768, 794)):
        drawing.arrow(start, middle, end, middle)
    below = driver + DRIVER_HEIGHT
    for x in (250, 650):
        drawing.arrow(x, below, x, rows - 13, dashed=True)
    drawing.arrow(870, below, 870, rows - 3, dashed=True)
    drawing.tick(344 + 10, rows + BOX_HEIGHT)
    drawing.tick(756 + 10, rows + BOX_HEIGHT)
    drawing.bolt(922, driver + 2)
    for x in (510, 734, 922):
        drawing.bolt(x, rows + 2)


def draw_scoring(drawing: Drawing, top: float) -> None:
    drawing.text(16, top, "Scoring: jobs/score.py", size=16, bold=True)
    driver, rows = top + 14, top + 14 + DRIVER_HEIGHT + 34
    middle = rows + BOX_HEIGHT / 2
    drawing.box(
        "driver",
        *(16, driver, 928, DRIVER_HEIGHT),
        "driver, scoring/job.py",
        "plans the parts, leaves out those that are there; at the end reads all footers, compares, "
        "publishes, manifest last",
    )
    drawing.box(
        "files", 16, rows, 130, BOX_HEIGHT, "files", "Parquet on a", "disk, S3, …", "any columns"
    )
    drawing.box(
        *("task", 172, rows, 172, BOX_HEIGHT),
        "Ray Data",
        "from_items(plan):",
        "each row names some",
        "parts of files; no image",
        "passes through here",
    )
    drawing.box(
        *("worker", 382, rows, 374, BOX_HEIGHT),
        "actors: map_batches(ScoreParts)",
        "read a part and decode it; rejected rows have a reason",
        "predict in batches of one shape",
        "append the predictions to the columns of the input",
        "put the file whole, and only if there is none",
        copies=3,
    )
    drawing.box(
        *("files", 796, rows, 148, BOX_HEIGHT),
        "output folder",
        "predictions/",
        "files.parquet",
        "report.html",
        "manifest.json",
    )
    drawing.arrow(344, middle, 380, middle)
    drawing.arrow(768, middle, 794, middle)
    # From the files to the actors, below the box of Ray Data.
    _, soft = drawing.colours["text"]
    under = rows + BOX_HEIGHT + 20
    drawing.add(
        f'<path d="M81 {rows + BOX_HEIGHT} V{under} H460 V{rows + BOX_HEIGHT + 3}" '
        f'stroke="{soft}" stroke-width="1.6" fill="none" marker-end="url(#head)"/>'
    )
    drawing.text(96, under - 6, "rows", size=11.5)
    below = driver + DRIVER_HEIGHT
    drawing.arrow(258, below, 258, rows - 3, dashed=True)
    drawing.arrow(855, below, 855, rows - 3, dashed=True)
    drawing.arrow(885, rows, 885, below + 3, dashed=True)
    drawing.tick(146, rows + BOX_HEIGHT)
    drawing.tick(756 + 10, rows + BOX_HEIGHT)
    drawing.tick(885, driver + DRIVER_HEIGHT)
    drawing.bolt(922, driver + 2)
    for x in (734, 922):
        drawing.bolt(x, rows + 2)


def draw_legend(drawing: Drawing, top: float) -> None:
    names = {
        "driver": "driver",
        "task": "Ray Data",
        "memory": "object store",
        "worker": "workers, on any node",
        "files": "disk or bucket",
    }
    x = 16.0
    for kind, name in names.items():
        fill, border = drawing.colours[kind]
        drawing.add(
            f'<rect x="{x}" y="{top}" width="16" height="16" rx="4" fill="{fill}" '
            f'stroke="{border}" stroke-width="1.5"/>'
        )
        drawing.text(x + 23, top + 12.5, name)
        x += 42 + 7.0 * len(name)
    drawing.tick(x + 8, top + 8)
    drawing.text(x + 23, top + 12.5, "rows are counted")
    x += 42 + 7.0 * len("rows are counted")
    drawing.bolt(x + 8, top + 8)
    drawing.text(x + 23, top + 12.5, "tests kill or break it")


def main() -> None:
    for scheme, name in (("light", "architecture.svg"), ("dark", "architecture-dark.svg")):
        drawing = Drawing(scheme, height=610)
        draw_training(drawing, 24)
        draw_scoring(drawing, 306)
        draw_legend(drawing, 580)
        Path(__file__).with_name(name).write_text(drawing.svg())


if __name__ == "__main__":
    main()
