"""Answer for pictures over HTTP with Ray Serve. Needs: pip install 'ray[serve]'

python jobs/examples/serve.py runs/mine 8000
curl --data-binary @seven.png 'http://127.0.0.1:8000/?number=5'
"""

import sys
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Query
from ray import serve

from mnistsum_ray import RequestError, TwoHeadCNN, load_model, predict

app = FastAPI()


@serve.deployment
@serve.ingress(app)
class Pictures:
    def __init__(self, network: TwoHeadCNN) -> None:
        self.network = network

    # Not `async`: FastAPI runs it in a thread, and the replica takes other requests meanwhile.
    @app.post("/")
    def answer(
        self,
        number: Annotated[int, Query(ge=0, le=9)],
        picture: Annotated[bytes, Body(media_type="image/*")],
    ) -> dict[str, Any]:
        try:
            found = predict(self.network, picture, number)
        except RequestError as error:
            raise HTTPException(422, str(error)) from None
        return {"digit": found.digit, "sum": found.sum, "unsure": found.unsure}


model, port = sys.argv[1:]
serve.start(http_options={"port": int(port)})
serve.run(Pictures.bind(load_model(model)), blocking=True)  # type: ignore[attr-defined]
