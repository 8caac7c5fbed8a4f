// Keeps an open page fresh, and switches light and dark. Pages work without it.
"use strict";

(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  name();
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    name();
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { name(); draw(); });

  function draw(within) {
    if (window.intentdCharts) window.intentdCharts.draw(within || document);
  }

  // Sections marked data-live are replaced by what the server renders now, unless in use.
  let busy = false;
  async function refresh() {
    if (busy || document.hidden) return;
    busy = true;
    try {
      const page = new URL(location.href);
      page.searchParams.delete("point"); // a preview is computed when asked for, not again and again
      const answer = await fetch(page, { credentials: "same-origin", redirect: "error" });
      if (!answer.ok) return;
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const old of document.querySelectorAll("[data-live]")) {
        const now = fresh.getElementById(old.id);
        if (!now || old.contains(document.activeElement)) continue;
        if (old.dataset.text === undefined) old.dataset.text = "";
        if (now.innerHTML === old.dataset.text) continue;
        old.dataset.text = now.innerHTML;
        if (window.intentdCharts) window.intentdCharts.drop(old);
        old.replaceChildren(...now.childNodes);
        draw(old);
      }
    } catch (error) {
      // the next event tries again
    } finally {
      busy = false;
    }
  }

  const status = document.getElementById("live");
  const live = document.querySelector("[data-live]") !== null;
  let polling = null;
  function follow() {
    const source = new EventSource(status.dataset.events);
    source.addEventListener("news", (event) => {
      const news = JSON.parse(event.data);
      const text = `Live: ${news.connected} of ${news.members} members connected, ` +
        `${news.alarms} alarm${news.alarms === 1 ? "" : "s"}.`;
      if (status.textContent !== text) status.textContent = text;
      if (live) refresh();
    });
    source.addEventListener("error", () => {
      status.textContent = "Not live: the controller does not answer; trying again.";
      if (source.readyState === EventSource.CLOSED && polling === null) {
        polling = setInterval(refresh, 10000);
      }
    });
  }

  // A deferred script runs before the charts' when the page has none.
  addEventListener("DOMContentLoaded", () => { draw(); });
  if (document.readyState !== "loading") draw();
  follow();
})();
