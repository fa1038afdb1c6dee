// Search in a site that was opened from a folder: browsers start no worker there. The worker's script runs in a hidden
// frame instead, and answers the page in the same way. (The plugin `offline` would fetch such a script from elsewhere.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow, waiting = [];
      this.send = message => waiting.push(message);
      inside.postMessage = message => this.dispatchEvent(new MessageEvent("message", {data: message}));
      const element = inside.document.createElement("script");
      element.src = script;
      element.onload = () => {
        this.send = message => inside.dispatchEvent(new inside.MessageEvent("message", {data: message}));
        waiting.forEach(this.send);
      };
      inside.document.body.append(element);
    }
    postMessage(message) { this.send(message); }
  };
}
