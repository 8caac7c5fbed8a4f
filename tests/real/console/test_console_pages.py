"""The console over HTTP, without a browser's help: pages, login, forms, refusals, escaping."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.parse
from typing import Any

import pytest
from tests.real.console.console_suite import HOSTILE, TOKENS, Suite, until

from intentd.controller.console.live import MAX_LISTENERS
from intentd.daemons.kit.admin import AdminRefusedError

pytestmark = pytest.mark.real

PAGES = ("", "flows", "jobs", "jobs?point=0", "prompts", "policies", "policies?application=jobs",
         "audit", "login")  # fmt: skip


class Browser:
    """Cookies and forms, no more. source: the address it comes from."""

    def __init__(self, suite: Suite, source: str = "127.0.0.1") -> None:
        self.source = source
        self.address = suite.url.removeprefix("http://")
        self.cookie = ""

    def get(self, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, origin: str | None = "", **form: str) -> tuple[int, str, Any]:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        if origin is not None:
            headers["Origin"] = origin or f"http://{self.address}"
        return self._ask("POST", path, urllib.parse.urlencode(form), headers)

    def _ask(
        self, method: str, path: str, body: str | None, headers: dict[str, str]
    ) -> tuple[int, str, dict[str, str]]:
        connection = http.client.HTTPConnection(
            self.address, timeout=60, source_address=(self.source, 0)
        )
        if self.cookie:
            headers = {**headers, "Cookie": self.cookie}
        connection.request(method, "/console/" + path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        found = {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        if "set-cookie" in found:
            self.cookie = found["set-cookie"].partition(";")[0]
        return answer.status, text, found

    def login(self, role: str) -> None:
        code, text, headers = self.post("login", token=TOKENS[role], next="/console/jobs")
        assert (code, headers.get("location")) == (303, "/console/jobs"), text
        assert "HttpOnly" in headers["set-cookie"]
        assert "SameSite=Strict" in headers["set-cookie"]

    def csrf(self, path: str = "") -> str:
        found = re.search(r'name="csrf" value="([^"]+)"', self.get(path)[1])
        assert found is not None
        return found[1]


def test_pages_hold_the_members_data_escaped(suite: Suite) -> None:
    browser = Browser(suite)
    for page in PAGES:
        code, text, headers = browser.get(page)
        assert code == 200, (page, text)
        assert "<script>alert" not in text, page
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert not re.search(r"<style|style=|<script(?! src=)|\son[a-z]+=", text), page
        for secret in TOKENS.values():
            assert secret not in text
    overview = browser.get("")[1]
    assert "agent/&lt;script&gt;alert(1)&lt;/script&gt;" in overview
    assert "gpu/gpu1" in overview
    until(lambda: "rack &lt;1&gt;" in browser.get("flows")[1])
    flows = browser.get("flows")[1]
    assert "Sizes of flows" in flows
    assert 'data-chart="time"' in flows
    jobs = browser.get("jobs")[1]
    assert "long-11" in jobs
    assert "GPUs, " in jobs, "says why jobs wait"
    point = browser.get("jobs?point=0")[1]
    assert "unfinished jobs would end sooner" in point
    assert "Apply point" not in point, "nobody is logged in"
    prompts = browser.get("prompts")[1]
    assert "model_selector" in prompts
    assert "$5.00" in prompts


def test_bad_addresses_are_told(suite: Suite) -> None:
    browser = Browser(suite)
    for path, code in (
        ("jobs?point=999", 400),
        ("jobs?point=x", 400),
        ("jobs?state=odd", 400),
        ("flows?domain=none", 400),
        ("prompts?days=9999", 400),
        ("policies?application=x", 400),
        ("policies?before=-1", 400),
        ("policies/jobs/999999", 400),
        ("policies/none/1", 404),
        ("static/../site.py", 404),
        ("static/.gitignore", 404),
        ("static/vendor/none.js", 404),
        ("none", 404),
    ):
        assert browser.get(path)[0] == code, path


def test_login_is_bounded_and_checked(suite: Suite) -> None:
    browser = Browser(suite, "127.0.0.9")  # that address is shut out afterwards
    assert browser.post("login", "http://evil.example", token=TOKENS["admin"])[0] == 403
    assert browser.post("login", None, token=TOKENS["admin"])[0] == 403
    assert browser.get("", Host="evil.example")[0] == 421
    assert browser.cookie == ""
    code, _, headers = browser.post("login", token=TOKENS["read"], next="//evil.example/")
    assert (code, headers["location"]) == (303, "/console/")
    codes = [browser.post("login", token=f"wrong-{at}")[0] for at in range(12)]
    assert codes == [403] * 10 + [429] * 2
    entries = suite.admin("controller").call("audit")["entries"]
    assert sum(row["result"] == "refused: unknown token" for row in entries) == 10
    assert "wrong-" not in json.dumps(entries)


def test_changes_need_session_role_origin_and_form(
    suite: Suite, sessions: dict[str, Browser]
) -> None:
    nobody, reader, operator = Browser(suite), sessions["read"], sessions["operate"]
    form = {"application": "jobs", "number": "1"}
    assert nobody.post("policies/rollback", **form)[0] == 303  # to the login
    assert reader.post("policies/rollback", csrf=reader.csrf(), **form)[0] == 403
    assert operator.post("policies/rollback", **form)[0] == 403
    assert operator.post("policies/rollback", csrf=reader.csrf(), **form)[0] == 403
    good = {"csrf": operator.csrf(), **form}
    assert operator.post("policies/rollback", "http://evil.example", **good)[0] == 403
    for path in ("/api/policies/rollback",):
        connection = http.client.HTTPConnection(operator.address, timeout=60)
        connection.request("POST", path, "{}", {"Cookie": operator.cookie})
        assert connection.getresponse().status in (401, 403), "a session is for forms alone"
        connection.close()
    code, _, _ = operator.post("policies/rollback", csrf=operator.csrf(), number="99999",
                               application="jobs")  # fmt: skip
    assert code == 303
    assert "got 99999, expected a policy of jobs that is kept" in operator.get("policies")[1]


@pytest.fixture(scope="session")
def sessions(suite: Suite) -> dict[str, Browser]:
    made = {role: Browser(suite) for role in TOKENS}
    for role, browser in made.items():
        browser.login(role)
    return made


def test_a_point_is_applied_and_rolled_back(suite: Suite, sessions: dict[str, Browser]) -> None:
    operator, admin = sessions["operate"], suite.admin("controller")
    before = admin.call("policy_show", application="jobs")["number"]
    page = operator.get("jobs?point=0")[1]
    front = re.search(r'name="front" value="(\d+)"', page)
    assert front is not None
    form = {"csrf": operator.csrf(), "point": "0"}
    operator.post("jobs/apply", front="77", **form)
    assert "expected the present front" in operator.get("jobs")[1]
    assert operator.post("jobs/apply", front=front[1], **form)[0] == 303
    assert "Issued policy" in operator.get("jobs")[1]
    shown = admin.call("policy_show", application="jobs")
    assert shown["number"] > before
    assert shown["author"] == "configured-2"
    until(lambda: suite.admin("gpu").call("status")["policies"]["jobs"][1] == shown["number"])
    back = {"csrf": operator.csrf(), "application": "jobs", "number": str(before)}
    operator.post("policies/rollback", **back)
    page = operator.get("policies?application=jobs")[1]
    assert f"rest since configured-2 rolled back to {before}" in page
    operator.post("policies/release", csrf=operator.csrf(), application="jobs")
    assert "Automatic policies go on." in operator.get("policies?application=jobs")[1]
    rows = admin.call("audit", limit=10)["entries"]
    told = {row["action"]: row for row in rows if row["result"] == "done"}
    assert told["pareto_apply"]["who"] == "configured-2"
    assert told["pareto_apply"]["via"] == "console"
    assert told["pareto_apply"]["before"].endswith(f".{before}")
    assert told["policy_rollback"]["after"] != told["policy_rollback"]["before"]


def test_the_playground_asks_and_regenerates(suite: Suite, sessions: dict[str, Browser]) -> None:
    operator = sessions["operate"]
    form = {"csrf": operator.csrf(), "proxy": "proxy1", "service_type": "model_selector"}
    code, text, _ = operator.post("prompts", prompt=HOSTILE, **form)
    assert code == 200, text
    assert "Hello there." in text
    assert "<script>alert" not in text
    found = re.search(r'name="regenerate" value="([^"]+)"', text)
    assert found is not None
    code, text, _ = operator.post("prompts", prompt="p", regenerate=found[1], **form)
    assert code == 200, text
    code, text, _ = operator.post("prompts", prompt="p", regenerate="none", **form)
    assert code == 502
    assert "expected a recent answer" in text
    code, text, _ = operator.post("prompts", prompt="p", **{**form, "proxy": "none"})
    assert "proxy/none: not connected" in text
    rows = suite.admin("controller").call("audit", limit=20)["entries"]
    assert {row["action"] for row in rows} >= {"prompts.ask", "prompts.regenerate"}
    assert HOSTILE not in json.dumps([row["about"] for row in rows])


def test_a_made_token_opens_and_a_revoked_one_ends_the_session(suite: Suite) -> None:
    admin = suite.admin("controller")
    made = admin.call("tokens.new", name="ann", role="read")
    kept = (suite.where / "controller" / "tokens.json").read_text()
    assert made["secret"] not in kept
    browser = Browser(suite)
    assert browser.post("login", token=made["secret"])[0] == 303
    assert "ann (read)" in browser.get("")[1]
    with pytest.raises(AdminRefusedError, match="expected a name that no token has"):
        admin.call("tokens.new", name="ann", role="admin")
    admin.call("tokens.revoke", name="ann")
    assert "ann (read)" not in browser.get("")[1]
    rows = admin.call("audit", limit=20)["entries"]
    told = {(row["action"], row["about"], row["via"]) for row in rows}
    assert {("tokens.new", "ann", "admin"), ("tokens.revoke", "ann", "admin")} <= told
    assert made["secret"] not in json.dumps([rows, admin.call("status"), admin.call("tokens")])


def test_listeners_are_bounded(suite: Suite) -> None:
    address = suite.url.removeprefix("http://")
    open_ones = []
    deadline = time.monotonic() + 30
    try:
        while len(open_ones) < MAX_LISTENERS:
            connection = http.client.HTTPConnection(address, timeout=60)
            connection.request("GET", "/console/events")
            response = connection.getresponse()
            if response.status == 503:  # a page of another test has left, which the next tick sees
                connection.close()
                assert time.monotonic() < deadline
                time.sleep(0.2)
                continue
            open_ones.append((connection, response))
            assert response.status == 200
        code, text, headers = Browser(suite).get("events")
        assert (code, headers["retry-after"]) == (503, "10")
        assert "more than 32 listeners" in text
        assert open_ones[0][1].readline() == b"retry: 3000\n"
        assert Browser(suite).get("")[0] == 200
    finally:
        for connection, _ in open_ones:
            connection.close()


def test_logout_ends_the_session(suite: Suite) -> None:
    browser = Browser(suite)
    browser.login("admin")
    kept, form = browser.cookie, browser.csrf()
    assert browser.post("logout", csrf="x")[0] == 403
    assert browser.post("logout", csrf=form)[0] == 303
    browser.cookie = kept
    assert "Log out" not in browser.get("")[1]
