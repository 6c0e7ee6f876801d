export function createAdapterBrowser() { const element = document.createElement("div"); element.textContent = "stub"; return { element, destroy() {} }; }
