"""People log in at a real OpenID provider: with the CLI, on another device, and on the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from fedtide.console import stored_logins
from fedtide.console.embedded.plan import free_ports
from fedtide.fabric.messages.people import LoginView
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
VERSION = "oidc-provider@^9.5.0"


@dataclass
class Provider:
    folder: Path
    port: int
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *kids: str) -> None:
        """With new keys of these names."""
        keys = []
        for kid in kids:
            key = ec.generate_private_key(ec.SECP256R1())
            keys.append({**ECAlgorithm.to_jwk(key, as_dict=True), "kid": kid, "use": "sig", "alg": "ES256"})
        (self.folder / "keys.json").write_text(json.dumps(keys))
        command = [
            "node",
            str(HERE / "oidc_provider.mjs"),
            str(self.folder),
            str(self.port),
            str(self.folder / "keys.json"),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "ready" in line:
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return
        raise AssertionError("the provider has ended")

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    folder = tmp_path_factory.mktemp("provider")
    assert shutil.which("npm") is not None, "apt-get install nodejs npm"
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent", VERSION], cwd=folder, check=True, timeout=300
    )
    made = Provider(folder, free_ports(1)[0])
    made.start("one")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def there(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    oidc = json.dumps({"issuer": provider.url, "roles": {"ml-ops": "operator"}})
    made = bring_up(tmp_path_factory.mktemp("people"), "eu", 1, "--coordinator-set", f"oidc={oidc}")
    yield made
    made.run("down")


OPEN: list[httpx.Client] = []


class Browser:
    """Follows redirects and fills the provider's forms, as a person does."""

    def __init__(self, person: str) -> None:
        self.person = person
        self.http = httpx.Client(follow_redirects=False, timeout=30)
        OPEN.append(self.http)

    def visit(self, url: str) -> httpx.Response:
        """Until a page has no form to fill and leads nowhere else."""
        answer = self.http.get(url)
        for _ in range(20):
            if answer.is_redirect:
                answer = self.http.get(urljoin(str(answer.request.url), answer.headers["Location"]))
                continue
            found = re.search(r"<form[^>]*action=\"([^\"]*)\"", answer.text)
            if found is None or "/ui/login" in str(answer.request.url):
                return answer
            fields = dict(
                re.findall(r"<input[^>]*type=\"hidden\"[^>]*name=\"([^\"]+)\"[^>]*value=\"([^\"]*)\"", answer.text)
            )
            fields |= {"login": self.person, "password": "any"} if 'name="login"' in answer.text else {}
            answer = self.http.post(urljoin(str(answer.request.url), found[1]), data=fields)
        raise AssertionError(f"it never ends: {answer.request.url}")


def where(provider: Provider) -> LoginView:
    return LoginView(issuer=provider.url, client_id="fedtide", scopes=["openid", "email", "offline_access"])


def logged_in(provider: Provider, person: str) -> dict[str, str]:
    said: list[str] = []
    made: list[dict[str, str]] = []
    flow = threading.Thread(target=lambda: made.append(stored_logins.with_browser(where(provider), said.append)))
    flow.start()
    until(lambda: bool(said), "the address")
    assert "You are logged in" in Browser(person).visit(said[0].removeprefix("log in here: ")).text
    flow.join(30)
    return made[0]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("webbrowser.open", lambda _: True)
    yield
    while OPEN:
        OPEN.pop().close()


def who(there: Installation, token: str) -> httpx.Response:
    return httpx.get(f"{there.state['apis'][0]}/v1/whoami", headers={"Authorization": f"Bearer {token}"})


def test_a_person_logs_in_with_the_cli_and_may_do_what_the_group_may(there: Installation, provider: Provider) -> None:
    made = logged_in(provider, "al")
    me = who(there, made["id_token"]).json()
    assert (me["name"], me["role"], me["via"]) == ("al@example.com", "operator", "oidc")
    nobody = who(there, logged_in(provider, "bo")["id_token"])
    assert nobody.status_code == 401
    assert "no role" in nobody.text

    api = there.state["apis"][0]
    stored_logins.keep(api, made)
    assert oct(stored_logins.file_of().stat().st_mode)[-3:] == "600"
    environment = {**os.environ, "FEDTIDE_SERVER": api}
    done = subprocess.run(
        ["fedtide", "whoami", "-o", "json"], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["name"] == "al@example.com"
    refused = subprocess.run(
        ["fedtide", "audit", "query"], env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 77
    assert "al@example.com is operator, and this needs admin" in refused.stderr

    ended = {**made, "ends_at": time.time() - 1}  # it is refreshed without anybody
    stored_logins.keep(api, ended)
    assert who(there, stored_logins.token_for(api)).status_code == 200


def test_a_person_logs_in_with_a_code_on_another_device(there: Installation, provider: Provider) -> None:
    said: list[str] = []
    made: list[dict[str, str]] = []
    flow = threading.Thread(target=lambda: made.append(stored_logins.with_device(where(provider), said.append)))
    flow.start()
    until(lambda: bool(said), "the code")
    found = re.fullmatch(r"open (\S+) and type (\S+)", said[0])
    assert found is not None
    browser = Browser("al")
    page = browser.http.get(found[1])
    xsrf = re.search(r"name=\"xsrf\" value=\"([^\"]+)\"", page.text)
    assert xsrf is not None
    answer = browser.http.post(found[1], data={"xsrf": xsrf[1], "user_code": found[2]})
    xsrf = re.search(r"name=\"xsrf\" value=\"([^\"]+)\"", answer.text)
    assert xsrf is not None
    answer = browser.http.post(found[1], data={"xsrf": xsrf[1], "user_code": found[2], "confirm": "yes"})
    assert answer.is_redirect
    browser.visit(urljoin(found[1], answer.headers["Location"]))
    flow.join(60)
    assert who(there, made[0]["id_token"]).json()["role"] == "operator"


def test_a_person_logs_in_on_the_page(there: Installation, provider: Provider) -> None:
    api = there.state["apis"][0]
    login = httpx.get(f"{api}/ui/login")
    assert "Log in with your identity provider" in login.text
    browser = Browser("al")
    page = browser.visit(f"{api}/ui/oidc")
    assert (page.status_code, page.request.url.path) == (200, "/ui/")
    assert browser.http.get(f"{api}/v1/whoami").json()["name"] == "al@example.com"
    assert browser.http.post(f"{api}/v1/join-tokens", json={}).status_code == 403
    assert Browser("bo").visit(f"{api}/ui/oidc").request.url.path == "/ui/login"
    too_large = Browser("ed").visit(f"{api}/ui/oidc")
    assert "put fewer claims (groups) into it" in too_large.text
    forged = httpx.get(f"{api}/ui/oidc/callback?code=x&state=y")
    assert forged.headers["Location"].endswith("login?wrong=1")
    logins = there.json("audit", "query", "--limit", "1000", "--action", "/ui/oidc/callback")
    assert ("al@example.com", "operator", "200", "") in {
        (e["who"], e["role"], e["outcome"], e["asked"]) for e in logins
    }


def test_a_provider_that_replaces_its_keys_is_followed(there: Installation, provider: Provider) -> None:
    before = logged_in(provider, "al")["id_token"]
    assert who(there, before).status_code == 200
    provider.stop()
    assert who(there, before).status_code == 200, "it is away, and its keys are known"
    provider.start("two")
    after = logged_in(provider, "al")["id_token"]
    until(lambda: who(there, after).status_code == 200, "that its new key is found", 30)
