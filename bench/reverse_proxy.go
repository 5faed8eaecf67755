//go:build ignore

// What one writes in Go for the same purpose: httputil.ReverseProxy behind TLS, an API key by its
// digest, a line of JSON per request.  With what makes it fast: connections to the upstream are kept,
// buffers are pooled, the log stays open, every piece is flushed at once.
//
//	reverse_proxy LISTEN UPSTREAM-URL KEY CERT CERT-KEY LOG
package main

import (
	"crypto/sha256"
	"fmt"
	"log"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"sync"
	"time"
)

type buffers struct{ sync.Pool }

func (b *buffers) Get() []byte  { return b.Pool.Get().([]byte) }
func (b *buffers) Put(x []byte) { b.Pool.Put(x) }

// recorder remembers the status; Unwrap lets the proxy flush through it.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

func main() {
	upstream, err := url.Parse(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	file, err := os.OpenFile(os.Args[6], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		log.Fatal(err)
	}
	audit := slog.New(slog.NewJSONHandler(file, nil))
	digest := sha256.Sum256([]byte(os.Args[3]))
	keys := map[[32]byte]string{digest: fmt.Sprintf("sha256:%x", digest[:4])}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(upstream)
			r.SetXForwarded()
			r.Out.Header.Del("X-Api-Key")
		},
		FlushInterval: -1,
		BufferPool:    &buffers{sync.Pool{New: func() any { return make([]byte, 32<<10) }}},
		Transport:     &http.Transport{MaxIdleConnsPerHost: 1024, DisableCompression: true, IdleConnTimeout: time.Minute},
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		// Or the server may close the request's body under the proxy when the upstream is quick to answer.
		http.NewResponseController(w).EnableFullDuplex()
		answer := &recorder{w, http.StatusOK}
		name, known := keys[sha256.Sum256([]byte(r.Header.Get("X-Api-Key")))]
		if known {
			proxy.ServeHTTP(answer, r)
		} else {
			http.Error(answer, "Forbidden", http.StatusForbidden)
		}
		audit.Info("request", "key", name, "path", r.URL.Path, "status", answer.status, "method", r.Method,
			"client", r.RemoteAddr, "duration_ms", time.Since(began).Milliseconds())
	})
	log.Fatal((&http.Server{Addr: os.Args[1], Handler: handler}).ListenAndServeTLS(os.Args[4], os.Args[5]))
}
