package kbuild_test

import ("testing";"os";"fmt";"io";"crypto/sha256";"encoding/hex"
"github.com/memlinux/memlinux/imagegen/kbuild"
"github.com/memlinux/memlinux/imagegen/kbuild/kbuildtest")

func TestXX(t *testing.T) {
	if os.Getenv("XX") == "" { t.Skip() }
	f := kbuildtest.Source(t)
	h := sha256.New()
	st, _ := f.Stat()
	io.Copy(h, io.NewSectionReader(f, 0, st.Size()))
	r := kbuild.Request{SourceSHA256: hex.EncodeToString(h.Sum(nil)), Base: "minimal"}
	k, err := r.Key(t.Context())
	fmt.Println("KEY", k, err, r.SourceSHA256)
}
