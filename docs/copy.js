// The button that copies a block takes what can be run: no prompts, and no output.
document$.subscribe(() => {
  for (const code of document.querySelectorAll("pre > code")) {
    const lines = code.textContent.split("\n");
    if (!lines.some((line) => line.startsWith(">>>"))) continue;
    const typed = lines.filter((line) => /^(>>>|\.\.\.)( |$)/.test(line)).map((line) => line.slice(4));
    const button = code.parentElement.querySelector("[data-clipboard-target]");
    if (button) button.setAttribute("data-clipboard-text", typed.join("\n"));
  }
});
