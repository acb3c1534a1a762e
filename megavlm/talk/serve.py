"""`megavlm serve`: the page and the endpoint on one port. Tested by `tests/talk/test_page.py`."""

import ipaddress
import os
import socket
from typing import Any

from megavlm.errors import MegavlmError
from megavlm.parts.trained import load_trained
from megavlm.talk.line import Line
from megavlm.talk.talker import Talker

ONLY_FROM_HERE = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
"""What a browser may load for the page: nothing from elsewhere, whatever the page's library would like."""


def serve(run: str, host: str, port: int, overrides: dict[str, Any], *, has_page: bool) -> None:
    """Serve until Ctrl-C.

    Raises:
        MegavlmError: If the port is taken, an extra is not installed, or there is no model.
    """
    # before anything of gradio is imported: it would report to its makers
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1")
    try:
        import uvicorn
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from megavlm.talk import endpoint

        if has_page:
            from megavlm.talk import page
    except ModuleNotFoundError as error:
        raise MegavlmError(f"{error.name} is not installed\n  do:    pip install 'megavlm[serve]'") from error
    with listening(host, port) as listener:
        model = load_trained(run, overrides)[0]
        talker, line = Talker(model), Line()
        app = endpoint.make_app(talker, line, name=run)
        app.add_middleware(LocalOnly)
        if _is_loopback(host):  # or a page of another site could use the model through the user's browser
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])
        if has_page:
            page.mount(app, talker, line, name=run)
        port = listener.getsockname()[1]

        class Server(uvicorn.Server):
            async def startup(self, sockets=None) -> None:
                await super().startup(sockets)
                print(f"{model.checkpoint}: http://{host}:{port}   (endpoint: /v1, Ctrl-C ends it)", flush=True)
                if not _is_loopback(host):
                    print(f"whoever reaches port {port} of this machine can use the model", flush=True)

        try:
            Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listener])
        finally:
            line.close()


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens, taken before the model is read."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise MegavlmError(
            f"cannot listen on port {port} of {host}: {getattr(error, 'strerror', None) or error}\n"
            "  do:    give another --port (0 takes a free one), or end what uses it"
        ) from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class LocalOnly:
    """Around an app: no browser loads anything from elsewhere for it."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", ONLY_FROM_HERE.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)
