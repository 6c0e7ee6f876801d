// The sidebar tab; its state is kept outside its elements, since ComfyUI may re-render them.

import { JobList } from "./job_list.js";
import { JobPage } from "./job_page.js";
import { createAdapterBrowser } from "../adapters/browser.js";
import { addLoadAndApply } from "../graph.js";
import { build, setAttribute } from "../elements.js";
import { createPairsView } from "../pairs/view.js";
import { createTranslator } from "../translation.js";

export const TAB_ID = "qwen_edit_lora";
const STYLES = [
  "../theme.css",
  "./panel.css",
  "./job_page.css",
  "../adapters/adapters.css",
  "../adapters/cards.css",
  "../adapters/details.css",
  "../pairs/pairs.css",
];
const ICON = "pi pi-chart-line";

// Returns {showJob(id), showPairs(id)}: opens the tab at a training, or at a set of pairs.
export function registerSidebar({ app, api, jobs }) {
  for (const style of STYLES) addStyles(new URL(style, import.meta.url));
  const panel = new Panel({ app, api, jobs });
  const t = createTranslator(app);
  app.extensionManager.registerSidebarTab({
    id: TAB_ID,
    icon: ICON,
    title: t("tab.title"),
    tooltip: t("tab.tooltip"),
    type: "custom",
    render: (element) => panel.mount(element),
    destroy: () => panel.unmount(),
  });
  jobs.addEventListener("change", () => updateBadge(app, jobs));
  const show = (section) => (id) => showPlace(app, panel, { section, id });
  return { showJob: show("jobs"), showPairs: show("pairs") };
}

function addStyles(url) {
  document.head.append(build("link", { rel: "stylesheet", href: url.href }));
}

// The frontend calls a badge function only once, but it watches a tab's own field.
function updateBadge(app, jobs) {
  const tab = app.extensionManager.sidebarTab?.sidebarTabs?.find((one) => one.id === TAB_ID);
  const text = String(jobs.countActive() || "");
  if (tab && tab.iconBadge !== text) tab.iconBadge = text;
}

async function showPlace(app, panel, place) {
  panel.place = place;
  const { activeSidebarTabId } = app.extensionManager.sidebarTab ?? {};
  if (activeSidebarTabId === TAB_ID) panel.show();
  else await app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB_ID}`);
}

class Panel {
  constructor({ app, api, jobs }) {
    Object.assign(this, { app, api, jobs });
    this.place = { section: "jobs", id: null };
    this.root = null;
    this.view = null;
    this.isUpdateDue = false;
    jobs.addEventListener("change", () => this.requestUpdate());
  }

  mount(element) {
    if (this.root?.parentElement === element) return;
    this.unmount();
    this.t = createTranslator(this.app);
    this.tabs = ["jobs", "adapters", "pairs"].map((section) =>
      build(
        "button",
        {
          type: "button",
          class: "qel-tab",
          role: "tab",
          "data-section": section,
          onclick: () => this.go({ section, id: null }),
        },
        this.t(`tab.${section}`)
      )
    );
    this.body = build("div", { class: "qel-panel-body", role: "tabpanel" });
    const nav = build(
      "div",
      { class: "qel-tabs", role: "tablist", "aria-label": this.t("tab.sections") },
      this.tabs
    );
    nav.addEventListener("keydown", (event) => this.press(event));
    this.root = build("div", { class: "qel-panel" }, nav, this.body);
    element.style.height = "100%"; // of the sidebar; the views scroll inside
    element.replaceChildren(this.root);
    this.show();
    this.jobs.refresh();
  }

  unmount() {
    this.view?.destroy?.();
    this.view = null;
    this.root?.remove();
    this.root = null;
  }

  go(place) {
    const wasInside = this.place.id;
    this.place = place;
    this.show();
    if (place.id) this.view.name?.focus();
    else if (wasInside) this.body.querySelector("button.qel-job, button.qel-set")?.focus();
  }

  show() {
    if (!this.root) return;
    const { app, api, jobs, t, place } = this;
    this.view?.destroy?.();
    for (const tab of this.tabs) {
      const isOpen = tab.dataset.section === place.section;
      setAttribute(tab, "aria-selected", isOpen);
      tab.tabIndex = isOpen ? 0 : -1;
    }
    const open = (id) => this.go({ section: "jobs", id });
    if (place.section === "adapters") {
      this.view = createAdapterBrowser({ app, api, t, openJob: open });
    } else if (place.section === "pairs") {
      const go = (id) => this.go({ section: "pairs", id });
      this.view = createPairsView({ app, api, t, id: place.id, go });
    } else if (place.id) {
      const leave = () => this.go({ section: "jobs", id: null });
      const loadIntoGraph = (name) => this.loadIntoGraph(name);
      this.view = new JobPage({ jobs, t, id: place.id, open, leave, loadIntoGraph });
    } else {
      this.view = new JobList({ jobs, t, open });
    }
    this.body.replaceChildren(this.view.element);
    this.update();
  }

  async loadIntoGraph(name) {
    const { apply } = await addLoadAndApply(this.app, name);
    this.app.extensionManager.toast.add({
      severity: "success",
      summary: this.t("toast.loaded", { name }),
      detail: this.t(apply ? "toast.loadedDetail" : "toast.filledDetail"),
      life: 6000,
    });
  }

  // At most one update per frame, however many events arrive.
  requestUpdate() {
    if (this.isUpdateDue || !this.root) return;
    this.isUpdateDue = true;
    requestAnimationFrame(() => {
      this.isUpdateDue = false;
      this.update();
    });
  }

  update() {
    if (!this.root || !this.view?.update) return;
    const started = performance.now();
    this.view.update();
    performance.measure("qwen_edit_lora.update", { start: started });
  }

  press(event) {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const index = this.tabs.indexOf(document.activeElement);
    const step = event.key === "ArrowLeft" ? this.tabs.length - 1 : 1;
    const next = this.tabs[(index + step) % this.tabs.length];
    this.go({ section: next.dataset.section, id: null });
    next.focus();
    event.stopPropagation();
  }
}
