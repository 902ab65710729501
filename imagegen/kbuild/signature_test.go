package kbuild

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/memlinux/memlinux/testvm/need"
)

func newKey(t testing.TB, name string, config *packet.Config) *openpgp.Entity {
	t.Helper()
	if config == nil {
		config = &packet.Config{}
	}
	config.Algorithm = packet.PubKeyAlgoEdDSA
	e, err := openpgp.NewEntity(name, "", name+"@example.org", config)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func public(t testing.TB, keys ...*openpgp.Entity) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, k := range keys {
		if err := k.Serialize(&b); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func sign(t testing.TB, by *openpgp.Entity, message string) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := openpgp.DetachSign(&b, by, strings.NewReader(message), nil); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func armored(t testing.TB, kind string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := armor.Encode(&out, kind, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(b)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return append([]byte("\n"), out.Bytes()...)
}

func TestVerifySignature(t *testing.T) {
	const message = "as if it were a tar"
	greg, other := newKey(t, "greg", nil), newKey(t, "other", nil)
	long := time.Now().Add(-48 * time.Hour)
	expired := newKey(t, "expired", &packet.Config{Time: func() time.Time { return long }, KeyLifetimeSecs: 3600})
	keyring, sig := public(t, other, greg), sign(t, greg, message)
	late := func() []byte {
		var b bytes.Buffer
		if err := openpgp.DetachSign(&b, expired, strings.NewReader(message), &packet.Config{Time: func() time.Time { return long.Add(time.Minute) }}); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}()
	for _, tc := range []struct {
		name          string
		message       string
		sig, keyring  []byte
		signer, wants string // one of them
	}{
		{"binary", message, sig, keyring, "greg <greg@example.org> (key ", ""},
		{"armored", message, armored(t, "PGP SIGNATURE", sig), armored(t, "PGP PUBLIC KEY BLOCK", keyring), "greg <greg@example.org> (key ", ""},
		{"another message", message + ".", sig, keyring, "", "does not match its signature"},
		{"by a key that is not in the keyring", message, sig, public(t, other), "", "which is not in the keyring"},
		{"by an expired key", message, late, public(t, expired), "", "does not count"},
		{"no signature", message, nil, keyring, "", "read the signature: it is empty"},
		{"a text as signature", message, []byte("hello"), keyring, "", "read the signature: "},
		{"a keyring as signature", message, keyring, keyring, "", "it is no detached OpenPGP signature"},
		{"an empty keyring", message, sig, nil, "", "read the keyring: it is empty"},
		{"a signature as keyring", message, sig, sig, "", "read the keyring: "},
		{"half a signature", message, sig[:len(sig)/2], keyring, "", "read the signature: it is no detached OpenPGP signature"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			signer, err := VerifySignature(t.Context(), strings.NewReader(tc.message), bytes.NewReader(tc.sig), bytes.NewReader(tc.keyring))
			if tc.signer != "" {
				if err != nil || !strings.HasPrefix(signer, tc.signer) {
					t.Errorf("%q, %v", signer, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.wants) || signer != "" {
				t.Errorf("%q, %v; want %q", signer, err, tc.wants)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := VerifySignature(ctx, strings.NewReader(message), bytes.NewReader(sig), bytes.NewReader(keyring)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := VerifySignature(t.Context(), io.MultiReader(strings.NewReader(message), broken{}), bytes.NewReader(sig), bytes.NewReader(keyring)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a truncated tar: %v", err)
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// What GnuPG signs and exports, as kernel.org's developers do, must be taken.
func TestVerifySignatureOfGnuPG(t *testing.T) {
	gpg := need.Tool(t, "gpg", "gnupg")
	home, err := os.MkdirTemp("", "gpg") // its socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
		os.RemoveAll(home)
	})
	run := func(stdin string, args ...string) []byte {
		cmd := exec.Command(gpg, append([]string{"--homedir", home, "--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"}, args...)...)
		cmd.Stdin = strings.NewReader(stdin)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %q: %v: %s", args, err, stderr.String())
		}
		return out
	}
	run("", "--quick-generate-key", "Linus <linus@example.org>", "rsa2048", "sign", "never")
	message := filepath.Join(home, "message")
	if err := os.WriteFile(message, []byte("tar"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, form := range []string{"--armor", "--no-armor"} {
		sig, keyring := run("tar", form, "--detach-sign"), run("", form, "--export")
		signer, err := VerifySignature(t.Context(), strings.NewReader("tar"), bytes.NewReader(sig), bytes.NewReader(keyring))
		if err != nil || !strings.HasPrefix(signer, "Linus <linus@example.org> (key ") {
			t.Errorf("%s: %q, %v", form, signer, err)
		}
	}
}

func FuzzVerifySignature(f *testing.F) {
	k := newKey(f, "k", nil)
	sig, keyring := sign(f, k, "m"), public(f, k)
	f.Add(sig, keyring)
	f.Add(armored(f, "PGP SIGNATURE", sig), armored(f, "PGP PUBLIC KEY BLOCK", keyring))
	f.Fuzz(func(t *testing.T, sig, keyring []byte) {
		if signer, err := VerifySignature(context.Background(), strings.NewReader("another"), bytes.NewReader(sig), bytes.NewReader(keyring)); err == nil && bytes.Contains(keyring, []byte("k@example.org")) && len(keyring) < 300 {
			t.Logf("%s signed it", signer)
		}
	})
}
