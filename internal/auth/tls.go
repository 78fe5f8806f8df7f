package auth

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// maxPEM bounds each file of certificates.
const maxPEM = 1 << 20

// TLSFiles name what a listener shows, and what it asks for.
type TLSFiles struct {
	// Cert and Key are the PEM files of the certificate and its key.
	Cert, Key string
	// ClientCA is the PEM file of who signs clients' certificates; "" asks for
	// none.
	ClientCA string
}

// Certificates are the files of a listener, read again when they have changed.
type Certificates struct {
	log *slog.Logger

	mu      sync.Mutex
	files   [3]watched // certificate, key, client CA
	checked time.Time
	config  *tls.Config // replaced, never changed
}

// OpenTLS reads the files. It returns nil when there are none.
func OpenTLS(files TLSFiles, log *slog.Logger) (*Certificates, error) {
	switch {
	case files == TLSFiles{}:
		return nil, nil //nolint:nilnil // no files, no certificates, no error
	case files.Cert == "" || files.Key == "":
		return nil, errdef.WithHint(fmt.Errorf("%w: TLS needs a certificate and its key", errdef.ErrInvalid),
			"give both --tls-cert and --tls-key")
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := &Certificates{log: log, files: [3]watched{{path: files.Cert}, {path: files.Key}, {path: files.ClientCA}}}
	return c, c.load()
}

// Config is a listener's configuration, which follows the files. A change of
// theirs is noticed within a second; one that cannot be used is logged, and
// leaves what was there before.
func (c *Certificates) Config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.current(), nil },
	}
}

// Reload reads the files again.
func (c *Certificates) Reload() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reload()
}

func (c *Certificates) current() *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if since := now.Sub(c.checked); since >= recheck || since < 0 {
		c.checked = now
		if c.files[0].changed() || c.files[1].changed() || c.files[2].changed() {
			c.reload()
		}
	}
	return c.config
}

// reload is called with mu held.
func (c *Certificates) reload() {
	if err := c.load(); err != nil {
		c.log.Error("certificates not read: those of before still hold", slog.Any("error", err))
	}
}

// load is called with mu held, or before anybody else has c.
func (c *Certificates) load() error {
	var pem [3][]byte
	for i := range c.files {
		if c.files[i].path == "" {
			continue
		}
		c.files[i].note()
		var err error
		if pem[i], err = readBounded(c.files[i].path, maxPEM); err != nil {
			return fmt.Errorf("read certificates: %w", err)
		}
	}
	cert, err := tls.X509KeyPair(pem[0], pem[1])
	if err != nil {
		return fmt.Errorf("%w: certificate %s and key %s: %w", errdef.ErrInvalid, c.files[0].path, c.files[1].path, err)
	}
	cfg := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"http/1.1"}, // streams are WebSockets
		Certificates: []tls.Certificate{cert},
		// A session that is resumed would not show its certificate again.
		SessionTicketsDisabled: true,
	}
	if c.files[2].path != "" {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem[2]) {
			return fmt.Errorf("%w: no certificate in %s", errdef.ErrInvalid, c.files[2].path)
		}
		// Whoever has none may still have a token, or ask for /healthz.
		cfg.ClientCAs, cfg.ClientAuth = pool, tls.VerifyClientCertIfGiven
	}
	c.config = cfg
	return nil
}
