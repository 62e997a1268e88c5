// Before anything is drawn: the scheme that was chosen. None is the system's.

document.documentElement.dataset.theme = localStorage.getItem("rwkv-miss-theme") ?? "";
