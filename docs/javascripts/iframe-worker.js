// Copyright (c) MAPSeg for MONAI contributors
// SPDX-License-Identifier: Apache-2.0
//
// Search in pages opened from disk. Browsers refuse to start a worker from a file, and the search of the theme is one:
// here its script runs in a hidden frame that takes and gives messages as a worker does. The theme's plugin `offline`
// knows this file by its name, and then asks no server for another.
"use strict";
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = (...files) => Promise.all(files.map((file) => load(inside, file)));
      this.ready = load(inside, url);
    }

    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.ready = this.ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };

  // Run a script in a frame; the promise is kept when it has run.
  const load = (inside, file) =>
    new Promise((resolve, reject) => {
      const script = inside.document.createElement("script");
      script.src = new URL(file, document.baseURI).href;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${file} cannot be read`));
      inside.document.head.append(script);
    });
}
