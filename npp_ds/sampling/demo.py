"""`npp demo`: one page on this machine that samples a model. Needs starlette and uvicorn (the extra `demo`)."""

import io
import socket
from pathlib import Path
from threading import Lock

import numpy as np
import uvicorn
from jinja2 import Environment, PackageLoader
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from npp_ds.errors import UserError
from npp_ds.sampling.folder import tiled
from npp_ds.sampling.image_model import ImageModel
from npp_ds.utils.screen import say

HOST = "127.0.0.1"
HOSTS = [HOST, "localhost"]
"""Names that a request may give: others are pages of the internet whose name was pointed at this machine."""
MOST_IMAGES, PER_ROW = 64, 8


def create_app(model: ImageModel) -> Starlette:
    """Return the application: the page at /, and at /images.png a PNG of the images that the query asks for."""
    names, one_at_a_time = model.class_names, Lock()
    classes = [(i, names[i] if names else f"class {i}") for i in range(model.weights.model.num_classes)]
    templates = Environment(loader=PackageLoader("npp_ds.sampling", "."), autoescape=True)
    page = templates.get_template("demo.html.j2").render(
        about=model.weights.describe(),
        name=model.weights.name,
        classes=classes,
        most=MOST_IMAGES,
        guided=model.weights.has_null_class,
    )

    def images(request: Request) -> Response:
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return PlainTextResponse("asked for by another site", 403)
        try:
            query = request.query_params
            count = int(query.get("count", "16"))
            if not 1 <= count <= MOST_IMAGES:
                raise UserError(f"count: found {count}, expected 1 to {MOST_IMAGES}")
            with one_at_a_time:
                found = model.sample(
                    int(query.get("class", "0")),
                    count,
                    cfg_scale=float(query.get("cfg", "1")),
                    seed=int(query.get("seed", "0")),
                )
        except (UserError, ValueError) as error:
            return PlainTextResponse(str(error), 400)
        png = io.BytesIO()
        tiled(np.stack([np.asarray(image) for image in found]), PER_ROW).save(png, "PNG")
        return Response(png.getvalue(), media_type="image/png")

    routes = [Route("/", lambda request: HTMLResponse(page)), Route("/images.png", images)]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


def serve(model: ImageModel, source: Path, port: int) -> None:
    """Serve the page to this machine until interrupted. Raises UserError if the port is taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; give another one with --port") from None
        say(f"{source}: http://{HOST}:{listener.getsockname()[1]} (Ctrl-C ends it)")
        uvicorn.Server(uvicorn.Config(create_app(model), log_level="warning")).run(sockets=[listener])
