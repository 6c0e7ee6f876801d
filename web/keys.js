// Keys pressed in the panel. ComfyUI's shortcuts listen on the window: Delete on a focused image
// would remove the selected node.

/** Of ComfyUI's shortcuts with Ctrl: run, save. They change nothing that is selected. */
const PASSED = new Set(["Enter", "s"]);

export function keepKeys(element) {
  element.addEventListener("keydown", (event) => {
    const isPassed = (event.ctrlKey || event.metaKey) && PASSED.has(event.key);
    if (!isPassed) event.stopPropagation();
  });
}
