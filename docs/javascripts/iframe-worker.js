// Search on pages opened from the disk: browsers start no worker from a file, so its script runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.scope = frame.contentWindow
      // what the script says goes to us, what we say goes to the script
      this.scope.postMessage = data => this.tell(this, data)
      this.waiting = []
      const script = this.scope.document.createElement("script")
      script.src = url
      script.onload = () => {
        for (const data of this.waiting.splice(0)) this.tell(this.scope, data)
        this.ready = true
      }
      this.scope.document.body.append(script)
    }
    postMessage(data) {
      if (this.ready) this.tell(this.scope, data)
      else this.waiting.push(data)
    }
    tell(target, data) {
      setTimeout(() => {
        const event = new MessageEvent("message", { data })
        target.dispatchEvent(event)
        if (target === this && this.onmessage) this.onmessage(event)
      })
    }
    terminate() {
      this.scope.frameElement.remove()
    }
  }
}
