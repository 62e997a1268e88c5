// The end of the conversation stays in sight where it was.

export function scrollToEnd() {
  window.scrollTo({ top: document.documentElement.scrollHeight });
}

export function keepingEnd(change) {
  const atEnd = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 80;
  change();
  if (atEnd) scrollToEnd();
}
