export async function addLoadAndApply() { throw new Error("stub"); }
