package auth

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

func (a authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

func (a authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

// issue makes a certificate and its key for a name and for 127.0.0.1.
func (a authority) issue(t *testing.T, name string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, &k.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	bytes, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: bytes}))
}

// handshake has a client speak to a listener with these certificates, and
// returns what each has seen.
func handshake(t *testing.T, c *Certificates, cfg *tls.Config) (server, client tls.ConnectionState, err error) {
	t.Helper()
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	type seen struct {
		state tls.ConnectionState
		err   error
	}
	done := make(chan seen, 1)
	go func() {
		conn, aerr := ln.Accept()
		if aerr != nil {
			done <- seen{err: aerr}
			return
		}
		s := tls.Server(conn, c.Config())
		herr := s.HandshakeContext(t.Context())
		done <- seen{s.ConnectionState(), errors.Join(herr, conn.Close())}
	}()
	d := tls.Dialer{Config: cfg}
	conn, err := d.DialContext(t.Context(), "tcp", ln.Addr().String())
	if err == nil {
		client = conn.(*tls.Conn).ConnectionState()
		defer func() { _ = conn.Close() }()
	}
	there := <-done
	return there.state, client, errors.Join(err, there.err)
}

func TestTLS(t *testing.T) {
	t.Parallel()
	dir, ca, stranger := t.TempDir(), newAuthority(t), newAuthority(t)
	files := TLSFiles{Cert: filepath.Join(dir, "cert"), Key: filepath.Join(dir, "key"), ClientCA: filepath.Join(dir, "ca")}
	renew := func(name string) {
		t.Helper()
		cert, key := ca.issue(t, name)
		write(t, files.Cert, cert)
		write(t, files.Key, key)
	}
	renew("one")
	write(t, files.ClientCA, ca.pem())
	var log bytes.Buffer
	c, err := OpenTLS(files, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	client := &tls.Config{RootCAs: ca.pool(), ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12}
	shows := func(want string) {
		t.Helper()
		server, state, failed := handshake(t, c, client)
		if failed != nil || state.PeerCertificates[0].Subject.CommonName != want || len(server.VerifiedChains) != 0 {
			t.Errorf("shows %v, %v, want %s", state.PeerCertificates, failed, want)
		}
	}
	shows("one")

	renew("two")
	shows("one") // it was looked at a moment ago
	c.checked = time.Time{}
	shows("two")
	write(t, files.Cert, "garbage")
	c.Reload()
	shows("two")
	if !strings.Contains(log.String(), "those of before still hold") {
		t.Errorf("log %q", log.String())
	}
	renew("three")
	c.Reload()
	shows("three")

	old := client.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	if _, _, err = handshake(t, c, old); err == nil {
		t.Error("TLS 1.1 was accepted")
	}

	for name, tt := range map[string]struct {
		by   authority
		good bool
	}{"alice": {ca, true}, "mallory": {stranger, false}} {
		cert, key := tt.by.issue(t, name)
		pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
		if err != nil {
			t.Fatal(err)
		}
		cfg := client.Clone()
		// Shown also to who has not asked for its signer.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
		server, _, err := handshake(t, c, cfg)
		if (err == nil) != tt.good {
			t.Errorf("%s: %v", name, err)
		}
		if tt.good && (len(server.VerifiedChains) == 0 || server.VerifiedChains[0][0].Subject.CommonName != name) {
			t.Errorf("%s: chains %v", name, server.VerifiedChains)
		}
	}
}

func TestBadTLSFiles(t *testing.T) {
	t.Parallel()
	dir, ca := t.TempDir(), newAuthority(t)
	cert, key := ca.issue(t, "x")
	_, otherKey := ca.issue(t, "y")
	path := func(name, content string) string {
		p := filepath.Join(dir, name)
		write(t, p, content)
		return p
	}
	c, k, o, g := path("cert", cert), path("key", key), path("other", otherKey), path("garbage", "garbage")
	for name, tt := range map[string]struct {
		files TLSFiles
		want  error
	}{
		"good":        {TLSFiles{Cert: c, Key: k}, nil},
		"no_key":      {TLSFiles{Cert: c}, errdef.ErrInvalid},
		"no_cert":     {TLSFiles{Key: k}, errdef.ErrInvalid},
		"only_ca":     {TLSFiles{ClientCA: c}, errdef.ErrInvalid},
		"another_key": {TLSFiles{Cert: c, Key: o}, errdef.ErrInvalid},
		"garbage":     {TLSFiles{Cert: g, Key: k}, errdef.ErrInvalid},
		"garbage_ca":  {TLSFiles{Cert: c, Key: k, ClientCA: g}, errdef.ErrInvalid},
		"missing":     {TLSFiles{Cert: c, Key: filepath.Join(dir, "none")}, errdef.ErrNotFound},
		"a_directory": {TLSFiles{Cert: dir, Key: k}, errdef.ErrInvalid},
	} {
		if _, err := OpenTLS(tt.files, nil); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	if c, err := OpenTLS(TLSFiles{}, nil); c != nil || err != nil {
		t.Errorf("none: %v, %v", c, err)
	}
}
