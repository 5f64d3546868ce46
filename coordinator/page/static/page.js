// Live pages, and buttons that ask the API. Everything else works without this file.
"use strict";
const api = document.documentElement.dataset.api;
const main = () => document.querySelector("main");

async function refresh() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (!answer.ok || answer.redirected) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
  if (fresh) become(main(), fresh);
}

// What is the same stays where it is: with the focus, what is scrolled, and what is open.
function become(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeName !== fresh.nodeName || old.id !== fresh.id) return old.replaceWith(fresh.cloneNode(true));
  if (old.nodeType !== Node.ELEMENT_NODE) { old.nodeValue = fresh.nodeValue; return; }
  for (const { name } of [...old.attributes])
    if (!fresh.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes)
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const [now, then] = [[...old.childNodes], [...fresh.childNodes]];
  then.forEach((each, n) => (n < now.length ? become(now[n], each) : old.append(each.cloneNode(true))));
  now.slice(then.length).forEach((each) => each.remove());
}

let waiting = 0;
function soon() {
  const typing = document.activeElement?.matches("main input, main select");
  if (waiting || document.hidden || typing) return;
  waiting = setTimeout(() => { waiting = 0; refresh(); }, 1000);
}

if (document.body.dataset.live !== undefined) {
  const events = new EventSource(api + "v1/events/watch");
  const state = document.getElementById("live");
  events.onmessage = soon;
  events.onopen = () => { state.textContent = "live"; soon(); };
  events.onerror = () => { state.textContent = "not connected"; };
  document.addEventListener("visibilitychange", soon);
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-post]");
  if (!button) return;
  if (!confirm(button.dataset.ask)) return;
  const answer = await fetch(api + button.dataset.post, {
    method: "POST",
    headers: { "Content-Type": "application/json", "Fedtide-By": "page" },
    body: "{}",
  });
  const said = document.getElementById("said");
  said.textContent = answer.ok ? "Done." : (await answer.json()).detail;
  refresh();
});
