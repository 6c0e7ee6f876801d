// The image of a paste event, unless a text is pasted into a field.

const FIELDS = "textarea, input";

export function readPastedImage(event) {
  const { items = [], types = [] } = event.clipboardData ?? {};
  // A browser's "copy image" comes with HTML; a text editor's selection with text.
  if (event.target.closest?.(FIELDS) && [...types].includes("text/plain")) return null;
  const image = [...items].find(({ kind, type }) => kind === "file" && type.startsWith("image/"));
  return image?.getAsFile() ?? null;
}
