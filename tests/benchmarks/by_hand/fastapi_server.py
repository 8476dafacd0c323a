"""A minimal FastAPI server around a run's model, as one writes it by hand: RUN PORT def|async."""

import sys

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

import cluster

run, port, way = sys.argv[1:]
model = cluster.open_model(run)
app = FastAPI()


class Body(BaseModel):
    rows: list


def answer(body: Body) -> dict:
    chances, classes = model(np.array(body.rows, np.uint8)).softmax(1).max(1)
    named = [model.classes[number] for number in classes.tolist()]
    pairs = zip(named, chances.tolist(), strict=True)
    return {"predictions": [{"class": name, "probability": chance} for name, chance in pairs]}


if way == "def":  # in a pool of threads

    @app.post("/predict")
    def predict(body: Body) -> dict:
        return answer(body)
else:

    @app.post("/predict")
    async def predict(body: Body) -> dict:
        return answer(body)


uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error")
