// What every page says, in English and Chinese; translations.js has a page's own words.

export const ENGLISH = {
  language: "中文",
  close: "Close",
  theme: "Colours",
  theme_system: "As the system",
  theme_light: "Light",
  theme_dark: "Dark",
  needs_key: "This server wants its API key. It is kept until this tab is closed.",
  use_key: "Use it",
  wrong_key: "The key is wrong.",
  busy: "The server is busy. Try again in {seconds} s.",
  copy: "Copy",
  copied: "Copied",
  cannot_copy: "The browser does not let pages copy here.",
  cancel: "Cancel",
  large_file: "{name} is too large. A file may have {most}.",
};

export const CHINESE = {
  language: "English",
  close: "关闭",
  theme: "配色",
  theme_system: "跟随系统",
  theme_light: "浅色",
  theme_dark: "深色",
  needs_key: "此服务器需要 API 密钥。密钥只保留到本标签页关闭。",
  use_key: "使用",
  wrong_key: "密钥不正确。",
  busy: "服务器繁忙，请在 {seconds} 秒后重试。",
  copy: "复制",
  copied: "已复制",
  cannot_copy: "浏览器不允许在此复制。",
  cancel: "取消",
  large_file: "{name} 太大，文件不能超过 {most}。",
};
