package kbuild

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// Sizes that no signature or keyring reaches: all of Debian's developers have
// 50 MB.
const (
	maxSignature = 1 << 20
	maxKeyring   = 128 << 20
)

// VerifySignature verifies a detached OpenPGP signature (RFC 9580) over a
// kernel's tar, which kernel.org signs before compressing it: tar is the plain
// tar, as tarball.NewReader gives it, and is read to its end. The signature and
// the keyring may each be armored or binary. It returns whose signature it is,
// as name, address and key. A key that has expired or was revoked, or that is
// not in the keyring, is an error.
func VerifySignature(ctx context.Context, tar io.Reader, signature, keyring io.Reader) (signer string, err error) {
	keys, err := readKeyring(keyring)
	if err != nil {
		return "", fmt.Errorf("read the keyring: %w", err)
	}
	sig, err := readSignature(signature)
	if err != nil {
		return "", fmt.Errorf("read the signature: %w", err)
	}
	by, err := openpgp.CheckDetachedSignature(keys, contextReader{ctx, tar}, bytes.NewReader(sig), nil)
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case errors.Is(err, pgperrors.ErrUnknownIssuer):
		return "", fmt.Errorf("the signature is by key %s, which is not in the keyring", issuers(sig))
	case errors.Is(err, pgperrors.ErrKeyExpired), errors.Is(err, pgperrors.ErrKeyRevoked), errors.Is(err, pgperrors.ErrSignatureExpired):
		return "", fmt.Errorf("the signature by key %s does not count: %w", issuers(sig), err)
	case err != nil:
		return "", fmt.Errorf("the kernel's tar does not match its signature: %w", err)
	}
	name := "somebody without a name"
	if id := by.PrimaryIdentity(); id != nil {
		name = id.Name
	}
	return fmt.Sprintf("%s (key %X)", name, by.PrimaryKey.Fingerprint), nil
}

// dearmor returns the binary form of what r has, at most limit bytes.
func dearmor(r io.Reader, limit int64) ([]byte, error) {
	in := bufio.NewReader(io.LimitReader(r, limit+1))
	var body io.Reader = in
	// A binary packet begins with its highest bit set (RFC 9580 §4.2).
	if first, err := in.Peek(1); err == nil && first[0] < 0x80 {
		block, err := armor.Decode(in)
		if errors.Is(err, io.EOF) {
			return nil, errors.New("it is neither OpenPGP's binary form nor its armored one")
		}
		if err != nil {
			return nil, err
		}
		body = block.Body
	}
	b, err := io.ReadAll(body)
	switch {
	case err != nil:
		return nil, err
	case len(b) == 0:
		return nil, errors.New("it is empty")
	case int64(len(b)) > limit:
		return nil, fmt.Errorf("it has more than %d MiB", limit>>20)
	}
	return b, nil
}

func readKeyring(r io.Reader) (openpgp.EntityList, error) {
	b, err := dearmor(r, maxKeyring)
	if err != nil {
		return nil, err
	}
	keys, err := openpgp.ReadKeyRing(bytes.NewReader(b))
	if err == nil && len(keys) == 0 {
		err = errors.New("no key is in it")
	}
	return keys, err
}

// readSignature returns a signature's packets. Anything else is an error here,
// before a gigabyte is hashed.
func readSignature(r io.Reader) ([]byte, error) {
	b, err := dearmor(r, maxSignature)
	if err != nil {
		return nil, err
	}
	for packets, n := packet.NewReader(bytes.NewReader(b)), 0; ; n++ {
		p, err := packets.Next()
		if errors.Is(err, io.EOF) && n > 0 {
			return b, nil
		}
		if _, is := p.(*packet.Signature); !is || err != nil {
			return nil, errors.New("it is no detached OpenPGP signature")
		}
	}
}

// issuers names the keys that signatures say they are by.
func issuers(b []byte) string {
	names := ""
	for packets := packet.NewReader(bytes.NewReader(b)); ; {
		p, err := packets.Next()
		if err != nil {
			return names
		}
		sig, is := p.(*packet.Signature)
		if !is {
			continue
		}
		if names != "" {
			names += ", "
		}
		switch {
		case sig.IssuerFingerprint != nil:
			names += fmt.Sprintf("%X", sig.IssuerFingerprint)
		case sig.IssuerKeyId != nil:
			names += fmt.Sprintf("%016X", *sig.IssuerKeyId)
		default:
			names += "unknown"
		}
	}
}

// contextReader is a reader that ends with a context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
