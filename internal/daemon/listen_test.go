package daemon

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
)

// selfSigned writes a certificate for 127.0.0.1, which signs itself, and its
// key.
func selfSigned(t *testing.T, dir, name string) (cert, key string, pool *x509.CertPool) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	err = errors.Join(os.WriteFile(cert, certPEM, 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return cert, key, pool
}

// TestExposure is which daemons may listen where other hosts reach them.
func TestExposure(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	cert, key, _ := selfSigned(t, dir, "daemon")
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte("a-token-of-enough-bytes"), 0o600); err != nil {
		t.Fatal(err)
	}
	withTLS := auth.TLSFiles{Cert: cert, Key: key}
	withCA := auth.TLSFiles{Cert: cert, Key: key, ClientCA: cert}
	for name, tt := range map[string]struct {
		cfg   Config
		plain bool
		named bool
		want  error
	}{
		"nothing":          {Config{}, false, false, errdef.ErrDenied},
		"plain":            {Config{}, true, false, errdef.ErrDenied},
		"only_tls":         {Config{TLS: withTLS}, false, false, errdef.ErrDenied},
		"only_token":       {Config{Auth: auth.Config{TokenFile: token}}, false, false, errdef.ErrDenied},
		"token_and_plain":  {Config{Auth: auth.Config{TokenFile: token}}, true, false, nil},
		"token_and_tls":    {Config{Auth: auth.Config{TokenFile: token}, TLS: withTLS}, false, false, nil},
		"named_and_tls":    {Config{TLS: withTLS}, false, true, nil},
		"certificates":     {Config{TLS: withCA}, false, false, nil},
		"ephemeral_cannot": {Config{Ephemeral: true, Auth: auth.Config{TokenFile: token}}, true, false, errdef.ErrDenied},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tt.cfg.StateDir = stateDir(t)
			if tt.named {
				if _, _, err := auth.Create(t.Context(), auth.StorePath(tt.cfg.StateDir), auth.Record{Name: "ci", Scope: auth.Fork}); err != nil {
					t.Fatal(err)
				}
			}
			d := open(t, tt.cfg)
			listeners, err := d.Listen(t.Context(), Addresses{Listen: "0.0.0.0:0", Plain: tt.plain})
			if !errors.Is(err, tt.want) || (err != nil && errdef.Hint(err) == "") {
				t.Errorf("%v, want %v", err, tt.want)
			}
			closeAll(t, listeners)
		})
	}
}

// serve serves d on the addresses until the test ends.
func serve(t *testing.T, d *Daemon, at Addresses) []net.Listener {
	t.Helper()
	listeners, err := d.Listen(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, listeners...) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return listeners
}

func newClient(t *testing.T, cfg client.Config) *client.Client {
	t.Helper()
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestServeTLS has a daemon behind TLS, and callers with and without what it
// asks for.
func TestServeTLS(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	cert, key, trusted := selfSigned(t, dir, "daemon")
	mine, myKey, _ := selfSigned(t, dir, "alice")
	_, bearer, err := auth.Create(t.Context(), auth.StorePath(dir), auth.Record{Name: "ci", Scope: auth.Read})
	if err != nil {
		t.Fatal(err)
	}
	_, signs, err := auth.Create(t.Context(), auth.StorePath(dir), auth.Record{Name: "deploy", Scope: auth.Fork, Sign: true})
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, Config{
		StateDir: dir, Version: "v1.2.3",
		Auth: auth.Config{CertificateScope: auth.Fork}, TLS: auth.TLSFiles{Cert: cert, Key: key, ClientCA: mine},
	})
	socket := filepath.Join(dir, "tine.sock")
	listeners := serve(t, d, Addresses{Socket: socket, Listen: "127.0.0.1:0"})
	url := "https://" + listeners[1].Addr().String()
	pair, err := tls.LoadX509KeyPair(mine, myKey)
	if err != nil {
		t.Fatal(err)
	}
	plain := &tls.Config{RootCAs: trusted, MinVersion: tls.VersionTLS12}
	shown := plain.Clone()
	shown.Certificates = []tls.Certificate{pair}
	for name, tt := range map[string]struct {
		cfg client.Config
		err string
	}{
		"nothing":          {client.Config{URL: url, TLS: plain}, "missing bearer token"},
		"bearer":           {client.Config{URL: url, TLS: plain, Token: bearer}, ""},
		"wrong_bearer":     {client.Config{URL: url, TLS: plain, Token: bearer + "x"}, "invalid bearer token"},
		"signing":          {client.Config{URL: url, TLS: plain, Token: signs}, ""},
		"wrong_signing":    {client.Config{URL: url, TLS: plain, Token: signs + "x"}, "invalid signature"},
		"certificate":      {client.Config{URL: url, TLS: shown}, ""},
		"owner_of_socket":  {client.Config{Socket: socket}, ""},
		"token_on_socket":  {client.Config{Socket: socket, Token: bearer}, ""},
		"unknown_signer":   {client.Config{URL: url, TLS: &tls.Config{MinVersion: tls.VersionTLS12}}, "certificate"},
		"plain_http":       {client.Config{URL: "http://" + listeners[1].Addr().String()}, "400"},
		"no_token_of_ours": {client.Config{URL: url, TLS: plain, Token: "tinesign_"}, "no name"},
	} {
		c := newClient(t, tt.cfg)
		v, err := c.Version(t.Context())
		switch {
		case tt.err == "" && (err != nil || v.Version != "v1.2.3"):
			t.Errorf("%s: %+v, %v", name, v, err)
		case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("%s: %v, want %s", name, err, tt.err)
		}
	}
	if err := newClient(t, client.Config{URL: url, TLS: plain}).Health(t.Context()); err != nil {
		t.Errorf("health: %v", err)
	}

	// The certificate is renewed under a daemon that runs.
	again, againKey, fresh := selfSigned(t, dir, "renewed")
	if err := errors.Join(os.Rename(againKey, key), os.Rename(again, cert)); err != nil {
		t.Fatal(err)
	}
	d.Reload()
	c := newClient(t, client.Config{URL: url, Token: bearer, TLS: &tls.Config{RootCAs: fresh, MinVersion: tls.VersionTLS12}})
	if _, err := c.Version(t.Context()); err != nil {
		t.Errorf("with the new certificate: %v", err)
	}
}

// TestHugeHeaders: they are refused before anybody looks at them.
func TestHugeHeaders(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	if _, _, err := auth.Create(t.Context(), auth.StorePath(dir), auth.Record{Name: "ci", Scope: auth.Read}); err != nil {
		t.Fatal(err)
	}
	listeners := serve(t, open(t, Config{StateDir: dir}), Addresses{Listen: "127.0.0.1:0"})
	c := newClient(t, client.Config{URL: "http://" + listeners[0].Addr().String(), Token: strings.Repeat("x", 1<<20)})
	_, err := c.Version(t.Context())
	if remote, ok := errors.AsType[*client.Error](err); err == nil || (ok && remote.Status != 431) {
		t.Errorf("a token of 1 MiB: %v", err)
	}
}
