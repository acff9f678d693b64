// The button that copies a block takes what can be run: no prompts and no output, and an empty line behind each
// indented block, which ends it where lines are typed.
const typed = (text) => {
  const lines = [];
  for (const line of text.split("\n")) {
    if (line.startsWith(">>>") && lines.at(-1)?.startsWith(" ")) lines.push("");
    if (/^(>>>|\.\.\.)( |$)/.test(line)) lines.push(line.slice(4));
  }
  return lines.join("\n") + "\n";
};

document$.subscribe(() => {
  for (const code of document.querySelectorAll("pre > code")) {
    if (!/^>>>/m.test(code.textContent)) continue;
    const block = code.closest(".highlight") ?? code.parentElement;
    const mark = () =>
      block.querySelector("[data-clipboard-target]")?.setAttribute("data-clipboard-text", typed(code.textContent));
    mark();
    // Where the button comes later than this.
    new MutationObserver(mark).observe(block, { childList: true, subtree: true });
  }
});
