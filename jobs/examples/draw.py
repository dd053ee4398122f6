"""Draw a digit in the browser and see what the model answers, with Ray Serve.

Needs: pip install 'ray[serve]'. Then open http://127.0.0.1:8000; other programs send pictures.

python jobs/examples/draw.py runs/mine 8000
curl --data-binary @seven.png 'http://127.0.0.1:8000/answer?number=5'
"""

import sys
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Query
from fastapi.responses import HTMLResponse
from ray import serve

from mnistsum_ray import RequestError, load_model, predict_rows
from mnistsum_ray.mnist import TwoHeadCNN, prepare_picture

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Draw a digit</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --digit: #1f5fa8; --sum: #b4520a }
  @media (prefers-color-scheme: dark) { :root { --digit: #7ab4f5; --sum: #f0a35e } }
  body { font: 16px/1.4 system-ui, sans-serif; max-width: 46rem; margin: 1rem auto;
         padding: 0 1rem }
  main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)) }
  canvas { width: 100%; max-width: 22rem; background: #fff; border: 1px solid #888;
           border-radius: 6px; touch-action: none; cursor: crosshair; display: block }
  fieldset { border: 0; padding: 0; margin: .75rem 0; display: flex; flex-wrap: wrap; gap: .25rem }
  legend { padding: 0 }
  label { min-width: 1.75rem; text-align: center; border: 1px solid #888; border-radius: 6px }
  label:has(:checked) { background: var(--sum); color: Canvas; border-color: var(--sum) }
  label:has(:focus-visible) { outline: 2px solid var(--digit) }
  input { position: absolute; opacity: 0 }
  button { font: inherit; padding: .2rem 1rem }
  #answer { font-size: 1.3rem; min-height: 3.6rem; margin: 0 }
  h2 { font-size: 1rem; margin: .5rem 0 .25rem }
  .bar { display: grid; grid-template-columns: 1.6rem 1fr 3.6rem; gap: .4rem; font-size: .8rem;
         line-height: 1.15rem; align-items: center; text-align: right }
  .bar i { display: block; height: .7rem; border-radius: 2px }
</style>
<h1>Draw a digit</h1>
<main>
  <section>
    <canvas width="448" height="448" aria-label="Draw a digit here"></canvas>
    <fieldset><legend>Number to add</legend></fieldset>
    <button type="button">Clear</button>
  </section>
  <section>
    <p id="answer" aria-live="polite"></p>
    <h2>Digit</h2><div id="digit"></div>
    <h2>Sum</h2><div id="sum"></div>
  </section>
</main>
<script>
const find = (query) => document.querySelector(query)
const canvas = find("canvas"), pen = canvas.getContext("2d"), said = find("#answer")
pen.lineWidth = 34
pen.lineCap = pen.lineJoin = "round"
let number = 7, last = null, isDrawn = false, asked = 0

for (let value = 0; value < 10; value++) {
  const choice = document.createElement("label")
  choice.innerHTML = `<input type="radio" name="number" value="${value}">${value}`
  choice.firstChild.checked = value === number
  choice.firstChild.onchange = () => { number = value; ask() }
  find("fieldset").append(choice)
}

function place(event) {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale]
}
canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId)
  last = place(event)
  draw(event)
}
canvas.onpointermove = (event) => { if (last) draw(event) }
canvas.onpointerup = canvas.onpointercancel = () => { if (last) { last = null; ask() } }
find("button").onclick = () => {
  pen.clearRect(0, 0, canvas.width, canvas.height)
  isDrawn = false
  show({digit_probs: Array(10).fill(0), sum_probs: Array(19).fill(0)}, "Draw a digit.")
}

function draw(event) {
  const next = place(event)
  pen.beginPath()
  pen.moveTo(...last)
  pen.lineTo(...next)
  pen.stroke()
  last = next
  isDrawn = true
}

async function ask() {
  if (!isDrawn) return
  const asking = ++asked, picture = await new Promise((done) => canvas.toBlob(done))
  try {
    const reply = await fetch(`answer?number=${number}`, {method: "POST", body: picture})
    const found = await reply.json()
    if (asking !== asked || !isDrawn) return
    if (!reply.ok) { said.textContent = found.detail; return }
    show(found, `It is ${found.digit}, and ${found.digit} + ${number} is ${found.sum}.`)
  } catch { said.textContent = "The server does not answer. Start draw.py again." }
}

function show(found, line) {
  said.textContent = line
  for (const head of ["digit", "sum"]) {
    const bars = found[`${head}_probs`].map((share, value) => {
      const percent = (100 * share).toFixed(1)
      return `<div class="bar"><span>${value}</span><i style="width: ${percent}%;`
        + ` background: var(--${head})"></i><span>${percent} %</span></div>`
    })
    find(`#${head}`).innerHTML = bars.join("")
  }
}
find("button").onclick()
</script>
</html>
"""

app = FastAPI(docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere


@serve.deployment
@serve.ingress(app)
class Drawings:
    def __init__(self, network: TwoHeadCNN) -> None:
        self.network = network

    @app.get("/", response_class=HTMLResponse)
    def page(self) -> str:
        return PAGE

    # Not `async`: FastAPI runs it in a thread, and the replica takes other requests meanwhile.
    @app.post("/answer")
    def answer(
        self,
        number: Annotated[int, Query(ge=0, le=9)],
        picture: Annotated[bytes, Body(media_type="image/*")],
    ) -> dict[str, Any]:
        try:
            rows = {"image": [prepare_picture(picture).tobytes()], "number": [number]}
        except RequestError as error:
            raise HTTPException(422, str(error)) from None
        (found,) = predict_rows(self.network, rows, probabilities=True).to_pylist()
        answers = {"digit": found["pred_digit"], "sum": found["pred_sum"]}
        return answers | {name: found[name] for name in ("digit_probs", "sum_probs")}


model, port = sys.argv[1:]
serve.start(http_options={"port": int(port)})
serve.run(Drawings.bind(load_model(model)), blocking=True)  # type: ignore[attr-defined]
