package nbdserve

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// named is an export of 1000 bytes, which is two blocks.
func named() Export {
	return Export{Name: "disk", Description: "a disk", Source: newGated(sourcetest.Content(1000))}
}

const (
	// HAS_FLAGS | READ_ONLY | SEND_FLUSH | CAN_MULTI_CONN | SEND_CACHE, and SEND_DF.
	plainFlags = "\x05\x07"
	dfFlags    = "\x05\x87"

	twoBlocks = "\x00\x00\x00\x00\x00\x00\x04\x00"
)

// TestOptions has each option and each way to get it wrong, with the replies by
// hand.
func TestOptions(t *testing.T) {
	ack := optionReply{kind: 1}
	refused := func(kind uint32) []optionReply { return []optionReply{{kind: kind | 1<<31}} }
	long := strings.Repeat("x", 5000)
	for _, c := range []struct {
		name   string
		before []uint32 // options without data
		id     uint32
		data   []any
		want   []optionReply // an error matches whatever it says
	}{
		{"list", nil, 3, nil, []optionReply{{2, "\x00\x00\x00\x04diska disk"}, ack}},
		{"list with data", nil, 3, []any{"x"}, refused(3)},
		{"structured replies", nil, 8, nil, []optionReply{ack}},
		{"structured replies twice", []uint32{8}, 8, nil, []optionReply{ack}},
		{"structured replies with data", nil, 8, []any{"x"}, refused(3)},
		{"structured replies after extended headers", []uint32{11}, 8, nil, refused(10)},
		{"extended headers", nil, 11, nil, []optionReply{ack}},
		{"extended headers after structured replies", []uint32{8}, 11, nil, []optionReply{ack}},
		{"extended headers with data", nil, 11, []any{"x"}, refused(3)},
		{"TLS without certificates", nil, 5, nil, refused(2)},
		{"withdrawn option", nil, 4, nil, refused(1)},
		{"unknown option with data", nil, 0xffffffff, []any{long}, refused(1)},

		{"info", nil, 6, []any{uint32(4), "disk", uint16(0)}, []optionReply{{3, "\x00\x00" + twoBlocks + plainFlags}, ack}},
		{"info, default export", nil, 6, []any{uint32(0), uint16(0)}, []optionReply{{3, "\x00\x00" + twoBlocks + plainFlags}, ack}},
		{"info, structured", []uint32{8}, 6, []any{uint32(0), uint16(0)}, []optionReply{{3, "\x00\x00" + twoBlocks + dfFlags}, ack}},
		{"info, everything", []uint32{11}, 6, []any{uint32(0), uint16(5), uint16(3), uint16(2), uint16(1), uint16(0), uint16(99)}, []optionReply{
			{3, "\x00\x00" + twoBlocks + dfFlags},
			{3, "\x00\x01disk"},
			{3, "\x00\x02a disk"},
			{3, "\x00\x03\x00\x00\x02\x00\x00\x00\x10\x00\x02\x00\x00\x00"},
			ack}},
		{"info, another name", nil, 6, []any{uint32(5), "disk2", uint16(0)}, refused(6)},
		{"info without data", nil, 6, nil, refused(3)},
		{"info, name longer than the option", nil, 6, []any{uint32(5), "disk"}, refused(3)},
		{"info, giant name", nil, 6, []any{uint32(0xffffffff), "disk", uint16(0)}, refused(3)},
		{"info, fewer requests than said", nil, 6, []any{uint32(0), uint16(0xffff), uint16(3)}, refused(3)},
		{"info, something behind", nil, 6, []any{uint32(0), uint16(0), "x"}, refused(3)},
		{"go, another name", nil, 7, []any{uint32(1), "x", uint16(0)}, refused(6)},
		{"go, broken", nil, 7, []any{uint32(1)}, refused(3)},

		{"contexts before structured replies", nil, 9, []any{uint32(0), uint32(0)}, refused(3)},
		{"contexts set before structured replies", nil, 10, []any{uint32(0), uint32(0)}, refused(3)},
		{"all contexts", []uint32{8}, 9, []any{uint32(4), "disk", uint32(0)}, []optionReply{
			{4, "\x00\x00\x00\x01base:allocation"}, {4, "\x00\x00\x00\x02x-erofs-oci:fetched"}, ack}},
		{"contexts of a namespace", []uint32{8}, 9, []any{uint32(0), uint32(1), uint32(5), "base:"}, []optionReply{
			{4, "\x00\x00\x00\x01base:allocation"}, ack}},
		{"contexts of an unknown namespace", []uint32{8}, 9, []any{uint32(0), uint32(1), uint32(5), "qemu:"}, []optionReply{ack}},
		{"set no context", []uint32{8}, 10, []any{uint32(0), uint32(0)}, []optionReply{ack}},
		{"set a namespace", []uint32{8}, 10, []any{uint32(0), uint32(1), uint32(5), "base:"}, []optionReply{ack}},
		{"set both contexts", []uint32{11}, 10, []any{uint32(0), uint32(3), uint32(15), "base:allocation", uint32(1), "x", uint32(19), "x-erofs-oci:fetched"},
			[]optionReply{{4, "\x00\x00\x00\x01base:allocation"}, {4, "\x00\x00\x00\x02x-erofs-oci:fetched"}, ack}},
		{"set for another export", []uint32{8}, 10, []any{uint32(1), "x", uint32(0)}, refused(6)},
		{"set, broken", []uint32{8}, 10, []any{uint32(0), uint32(0xffffffff), uint32(1)}, refused(3)},
		{"set, something behind", []uint32{8}, 10, []any{uint32(0), uint32(0), "x"}, refused(3)},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := start(t, named(), Options{})
			defer s.stop(t)
			k := s.connect(t)
			k.put(uint32(3))
			for _, id := range c.before {
				k.wantAck(k.option(id))
			}
			got := k.option(c.id, c.data...)
			for i := range got {
				if got[i].kind>>31 != 0 {
					got[i].data = ""
				}
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %+v\nwant %+v", got, c.want)
			}
			// The handshake goes on after an error.
			k.wantAck(k.option(7, uint32(0), uint16(0)))
		})
	}
}

func TestExportName(t *testing.T) {
	s := start(t, named(), Options{})
	defer s.stop(t)
	for _, c := range []struct {
		name  string
		flags uint32
		id    string
		want  string
	}{
		{"with zeroes", 1, "", twoBlocks + plainFlags + strings.Repeat("\x00", 124)},
		{"without", 3, "disk", twoBlocks + plainFlags},
		{"not fixed", 0, "disk", twoBlocks + plainFlags + strings.Repeat("\x00", 124)},
	} {
		k := s.connect(t)
		k.put(c.flags)
		k.sendOption(1, c.id)
		if got := string(k.bytes(len(c.want))); got != c.want {
			t.Errorf("%s: %q", c.name, got)
		}
		if r := k.do(request{cookie: 7, length: 256}); !bytes.Equal(r.data, sourcetest.Content(1000)[:256]) {
			t.Errorf("%s: read %v", c.name, r)
		}
		k.disconnect()
	}
}

func TestAbort(t *testing.T) {
	s := start(t, named(), Options{})
	defer s.stop(t)
	k := s.connect(t)
	k.put(uint32(3))
	k.wantAck(k.option(2))
	k.gone()
}

// TestDropped: what no reply can mend ends the connection, and nothing else.
func TestDropped(t *testing.T) {
	s := start(t, named(), Options{})
	defer s.stop(t)
	for name, say := range map[string]func(k *client){
		"unknown client flags": func(k *client) { k.put(uint32(4 | 3)) },
		"no magic":             func(k *client) { k.put(uint32(3), "IHAVENOT", uint32(7), uint32(0)) },
		"unknown export by the old way": func(k *client) {
			k.put(uint32(3))
			k.sendOption(1, "other")
		},
		"the old way with extended headers": func(k *client) {
			k.put(uint32(3))
			k.wantAck(k.option(11))
			k.sendOption(1)
		},
		"options of a client that is not fixed": func(k *client) {
			k.put(uint32(0))
			k.sendOption(3)
		},
		"giant option":   func(k *client) { tooBig(k, 0xffffffff) },
		"too big option": func(k *client) { tooBig(k, maxOption+1) },
		"too many options": func(k *client) {
			k.put(uint32(3))
			for range maxOptions {
				k.option(3)
			}
		},
		"garbage in transmission": func(k *client) {
			k.put(uint32(3))
			k.wantAck(k.option(7, uint32(0), uint16(0)))
			k.put(strings.Repeat("garbage ", 4)[:28])
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := s.connect(t)
			say(k)
			k.gone()
		})
	}
	s.enter(t, simple).disconnect()
}

// tooBig announces an option of n bytes and wants to be told off.
func tooBig(k *client, n uint32) {
	k.t.Helper()
	k.put(uint32(3), "IHAVEOPT", uint32(6), n)
	got := k.bytes(20)
	if !bytes.HasSuffix(got[:16], []byte{0, 0, 0, 6, 0x80, 0, 0, 9}) {
		k.t.Errorf("reply %x", got)
	}
	k.bytes(int(got[19]))
}

// TestHandshakeTimeout: a client that says nothing, or half of something, is let go.
func TestHandshakeTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, named(), Options{})
		defer s.stop(t)
		begin := time.Now()
		silent, half := s.connect(t), s.connect(t)
		half.put(uint32(3), "IHAVE")
		slow := s.enter(t, simple)
		half.gone()
		silent.gone()
		if d := time.Since(begin); d != 10*time.Second {
			t.Errorf("let go after %v", d)
		}
		// The deadline was the handshake's only.
		time.Sleep(time.Hour)
		if r := slow.do(request{cookie: 1, length: 256}); r.code != 0 {
			t.Errorf("%+v", r)
		}
		slow.disconnect()
	})
}

// certificate is a self-signed one for 127.0.0.1 that may do everything.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// TestTLS: a server with certificates serves nobody without TLS, and agrees on
// nothing before.
func TestTLS(t *testing.T) {
	cert, pool := certificate(t)
	s := start(t, named(), Options{TLS: &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}})
	defer s.stop(t)
	hello := func() *client {
		k := s.connect(t)
		k.put(uint32(3))
		return k
	}

	plain := hello()
	for _, id := range []uint32{3, 6, 7, 8, 9, 10, 11, 99} {
		if got := plain.option(id); len(got) != 1 || got[0].kind != 5|1<<31 {
			t.Errorf("option %d without TLS: %+v", id, got)
		}
	}
	if got := plain.option(5, "x"); got[0].kind != 3|1<<31 {
		t.Errorf("STARTTLS with data: %+v", got)
	}
	plain.sendOption(1, "disk")
	plain.gone()

	aborting := hello()
	aborting.wantAck(aborting.option(2))
	aborting.gone()

	// What comes with STARTTLS in one write would be taken for something said under TLS.
	injecting := hello()
	injecting.put("IHAVEOPT", uint32(5), uint32(0), "IHAVEOPT", uint32(8), uint32(0))
	injecting.gone()

	stranger := hello()
	stranger.wantAck(stranger.option(5))
	conn := tls.Client(stranger.Conn, &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"})
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("a client without a certificate is served")
	}

	garbler := hello()
	garbler.wantAck(garbler.option(5))
	garbler.put("no TLS at all")
	garbler.gone()

	k := hello()
	k.wantAck(k.option(5))
	k.Conn = tls.Client(k.Conn, &tls.Config{RootCAs: pool, ServerName: "127.0.0.1", Certificates: []tls.Certificate{cert}})
	if got := k.option(5); got[0].kind != 3|1<<31 {
		t.Errorf("STARTTLS twice: %+v", got)
	}
	k.wantAck(k.option(8))
	k.wantAck(k.option(7, uint32(0), uint16(0)))
	k.d = structured
	if r := k.do(request{cookie: 1, length: 256}); !bytes.Equal(r.data, sourcetest.Content(1000)[:256]) {
		t.Errorf("%+v", r)
	}
	k.disconnect()
}

// TestNewServer has what a server is not made of.
func TestNewServer(t *testing.T) {
	good := memory("x")
	for i, c := range []struct {
		e Export
		o Options
	}{
		{Export{}, Options{}},
		{Export{Source: good, Name: strings.Repeat("x", 4097)}, Options{}},
		{Export{Source: good, Name: "a\x00b"}, Options{}},
		{Export{Source: good, Description: "\xff"}, Options{}},
		{Export{Source: sized(-1)}, Options{}},
		{Export{Source: sized(1<<63 - 1)}, Options{}},
		{Export{Source: good}, Options{Workers: -1}},
		{Export{Source: good}, Options{MaxConns: -1}},
		{Export{Source: good}, Options{HandshakeTimeout: -1}},
		{Export{Source: good}, Options{ReadTimeout: -1}},
	} {
		if s, err := NewServer(c.e, c.o); err == nil {
			t.Errorf("case %d is accepted", i)
			s.Close()
		}
	}
	for size, want := range map[int64]int64{0: 0, 1: 512, 511: 512, 512: 512, 513: 1024, 1<<63 - 1024: 1<<63 - 1024} {
		s, err := NewServer(Export{Source: sized(size)}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Size(); got != want {
			t.Errorf("a source of %d bytes is an export of %d, want %d", size, got, want)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// sized is a source of a size, and of nothing else.
type sized int64

func (s sized) Size() int64 { return int64(s) }

func (s sized) ReadAt(context.Context, []byte, int64) error { return errors.New("nothing to read") }
